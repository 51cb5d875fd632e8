"""L2P: one pool of prompts for all tasks, of which each input takes those whose keys are nearest.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022 (arXiv 2112.08654).
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax.methods.base import Apply, Batch, Logs, real_rows
from sapt_jax.methods.pooling import mean_over_tokens
from sapt_jax.methods.sequential import Sequential
from sapt_jax.pet import Mixture, Prompt
from sapt_jax.settings import NOT_NEGATIVE, POSITIVE, setting
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree, width_of

TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class L2p(Sequential):
    """The input is [P_a; P_b; ...; x]: of the pool's prompts the `chosen` ones most alike the input, in its order.

    Likeness is the cosine of a prompt's key and the input's query, the mean over tokens of the frozen model's last
    hidden states. Every row chooses for itself, at test time too. In the one slot lies the pool [M * P, D], which
    starts as drawn tokens' embeddings, and in `selector` the keys [M, D], which start uniform in [-1, 1]. Both go on
    from task to task. The choice passes no gradient: keys learn from `pull` alone.
    """

    only: ClassVar[tuple[str, str] | None] = ("prompt", "chooses among prompts")

    size: int = setting(20, "Prompts in the pool, each of config.pet.prompt_length vectors.", POSITIVE)
    chosen: int = setting(4, "Of them before an input.", POSITIVE)
    pull: float = setting(0.5, "Weight of the chosen keys' cosines, summed; mean over rows.", NOT_NEGATIVE)

    mixing: ClassVar[str] = "routed"

    def __post_init__(self):
        super().__post_init__()
        if self.chosen > self.size:
            raise ValueError(
                f"config.l2p.chosen={self.chosen} of a pool of config.l2p.size={self.size}: choose no more than it has."
            )

    def prompt_length(self, capacity: int) -> int:
        return self.chosen * self.pet.prompt_length

    def block(self, parameters: Parameters) -> Tree:
        """The pool."""
        return Prompt(self.size * self.pet.prompt_length).block(parameters)

    def selector(self, parameters: Parameters) -> Tree:
        shape = (self.size, width_of(parameters))

        def uniform(rng, base):
            del base
            return jax.random.uniform(rng, shape, jnp.float32, -1.0, 1.0)

        return {"keys": Leaf(shape, (None, "query"), uniform)}

    def features(self, apply: Apply, base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        """The query [B, D]: the mean over tokens of the bare model's last hidden states."""
        return mean_over_tokens(apply(base, source, source_mask, method="encode"), source_mask)

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        """Weights [..., M] of the pool's prompts: 1 on the chosen ones."""
        _, nearest = jax.lax.top_k(cosines(features, trainable.selector["keys"]), self.chosen)
        return jax.nn.one_hot(nearest, self.size).sum(axis=-2)

    def mixture(self, frozen: Frozen, trainable: Trainable, weights: jax.Array, task: Task) -> Mixture:
        """The prompts with a weight, in the order of the pool."""
        _, chosen = jax.lax.top_k(weights, self.chosen)
        pool = trainable.slot["prompt"].reshape(self.size, self.pet.prompt_length, -1)
        return Mixture(prompt=jnp.take(pool, chosen, axis=0).reshape(len(weights), -1, pool.shape[-1]))

    def task_loss(
        self, apply: Apply, rng: jax.Array, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task
    ) -> tuple[jax.Array, Logs]:
        """Adds -`pull` times the mean over rows of the chosen keys' cosines, which are logged, for every answer token.

        A step divides by its number of answer tokens, so that they count once a row. Of micro-batches, those with more
        tokens count more.
        """
        query, real = self.features(apply, frozen.base, batch["source"], batch["source_mask"]), real_rows(batch)
        weights = self.weights(frozen, trainable, query, task, training=True)
        nll, logs = self.answer_loss(functools.partial(apply, rng=rng), frozen, trainable, weights, batch, task)
        alike = jnp.sum(weights * cosines(query, trainable.selector["keys"]) * real[:, None])
        per_token = batch["target_mask"].sum() / jnp.maximum(real.sum(), 1)
        return nll - self.pull * per_token * alike, {**logs, "cosines": alike}


def cosines(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Cosines [..., M] of queries [..., D] and keys [M, D]; zero for a query of zeros."""
    unit = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), TINY) for x in (queries, keys))
    return jnp.einsum("...D,MD->...M", *unit, precision=jax.lax.Precision.HIGHEST)
