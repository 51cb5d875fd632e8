"""Any-SSR: blocks learned alone, and chosen by ridge regression on the states of a low layer (arXiv 2503.13575)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax import state
from sapt_jax.methods.base import Apply, Batch, real_rows
from sapt_jax.methods.pooling import mean_over_tokens
from sapt_jax.methods.routed import HIGHEST, Routed
from sapt_jax.settings import POSITIVE, setting
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree


@dataclasses.dataclass(frozen=True)
class AnySsr(Routed):
    """A test input takes the block whose task the regression of tasks' one-hot labels on its features names.

    Features h are the mean over tokens of what the bare model's first layers make of an input, expanded to
    phi = ReLU(h Omega), Omega ~ N(0, 1 / D) and the same in every run. In `memory` are the sums over all rows of all
    tasks gram = phi phi^T [E, E] and cross = phi y^T [E, T], and router = (gram + gamma I)^-1 cross [E, T]: exact, so
    that the order of tasks does not matter. The paper's recursion gives the same in exact arithmetic; its blocks lie
    above the layers that are read, here they lie where config.pet.targets says.
    """

    layer: int = setting(4, "Of the bare model, whose states are read; no more than it has.", POSITIVE)
    expansion: int = setting(2048, "Width E of the random expansion; the paper has 10,000.", POSITIVE)
    gamma: float = setting(
        100.0, "Of the ridge. Where sums in float32 are coarser than it, their rounding takes its place.", POSITIVE
    )

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        by_task = Leaf((self.expansion, capacity), (None, state.TASKS))
        return {"gram": Leaf((self.expansion, self.expansion), (None, None)), "cross": by_task, "router": by_task}

    def features(self, apply: Apply, base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        """The mean [B, D] over tokens of the bare model's states after `layer` layers, before any final norm."""
        return mean_over_tokens(apply(base, source, source_mask, self.layer, method="encode"), source_mask)

    def expand(self, features: jax.Array) -> jax.Array:
        """phi [..., E] of features [..., D]."""
        width = features.shape[-1]
        omega = jax.random.normal(state.rng(0, "any_ssr"), (width, self.expansion)) / width**0.5
        return jax.nn.relu(jnp.matmul(features, omega, precision=HIGHEST))

    def fit_of_slots(self, frozen: Frozen, features: jax.Array) -> jax.Array:
        return jnp.matmul(self.expand(features), frozen.memory["router"], precision=HIGHEST)

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """The sums of a batch's rows, whose label is the task's slot."""
        features = self.features(apply, frozen.base, batch["source"], batch["source_mask"])
        phi = self.expand(features) * real_rows(batch)[:, None]
        label = jnp.arange(frozen.enabled.shape[0]) == task.slot
        gram = jnp.einsum("BE,BF->EF", phi, phi, precision=HIGHEST)
        return {"gram": gram, "cross": phi.sum(axis=0)[:, None] * label}

    def summarise(self, memory: Tree, totals: Tree) -> Tree:
        """The sums of all tasks so far, and the router that they give."""
        gram, cross = (totals[name] + memory[name] for name in ("gram", "cross"))
        # Entries are kept in float32: below its rounding of the whole no eigenvalue is known, and one may be negative.
        ridge = max(self.gamma, np.finfo(np.float32).eps * np.trace(gram))
        return {"gram": gram, "cross": cross, "router": np.linalg.solve(gram + ridge * np.eye(len(gram)), cross)}

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """The block is written to the task's slot, and what was found takes the memory's place."""
        if found is None:
            raise ValueError("a task cannot end before its features were measured")
        return super().end_task(frozen, trainable, found, task).replace(memory=found)
