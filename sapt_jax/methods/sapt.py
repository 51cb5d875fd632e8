"""SAPT: shared attentive learning and selection (SALS) with attentive reflection (ARM), arXiv 2401.08295."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapt_jax import state
from sapt_jax.methods import gaussians
from sapt_jax.methods.base import Apply, Batch, Logs, Method, Samples, Seen, own_slot, real_rows
from sapt_jax.methods.pooling import max_over_tokens
from sapt_jax.methods.reflection import reflection_loss
from sapt_jax.methods.shared_attention import QueryProjection, SharedAttention
from sapt_jax.settings import NOT_NEGATIVE, POSITIVE, setting
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree

WARM_START_ROWS = 256
CLOSED_GATE = 0.01
# Predictions are written with six decimals.
LEAST_ATTENTION = 1e-6


@dataclasses.dataclass(frozen=True)
class Sapt(Method):
    """Every task opens a block and a key of its own; one attention over all keys mixes the blocks.

    In `selector` are the key and the query projection, in `memory` the keys of earlier tasks [T, D] and their
    reflection targets [T, T]: row i the mean attention of task i just after it was learned, zero on later slots. With
    `statistics`, `memory` also has a Gaussian of each task's pooled training inputs, which the reflection loss draws
    from in place of pseudo-samples.
    """

    query_hidden: int = setting(100, "Width between the two matrices of the query projection.", POSITIVE)
    query_init_std: float | None = setting(
        None, "None: uniform by fan-in, as the released code for T5; 0.02 is its LLaMA.", POSITIVE, of_type=float
    )
    temperature: float = setting(1.0, "Multiplies sqrt(D) under the attention scores.", POSITIVE)
    pool_padding: bool = setting(False, "Pool padding too, as the released code.", protocol=True)
    learning: str = setting(
        "attention",
        "What mixes the blocks in training: the attention, the own block alone (the key then learns from the warm "
        "start), or all alike.",
        choices=("attention", "own", "mean"),
    )
    selection: str = setting("attention", "What mixes them at test time.", choices=("attention", "mean"))
    # 2.0 is the released code's effective weight on SuperNI with T5.
    kl_ratio: float = setting(
        2.0, "Weight of the mean KL of each earlier task, summed over tasks; 0 turns reflection off.", NOT_NEGATIVE
    )
    reflection_batch: int = setting(8, "Pseudo-samples of every earlier task that a step draws.", POSITIVE)
    reflect_in_first_update: bool = setting(
        True, "A task's first update has the reflection loss too; the released code leaves it out.", protocol=True
    )
    round_targets: bool = setting(False, "Reflection targets in bfloat16, as the released code.", protocol=True)
    warm_start_steps: int = setting(
        0, "Updates of key and query projection alone before a task's first step; not in the paper.", NOT_NEGATIVE
    )
    warm_start_learning_rate: float = setting(2e-3, "Of these updates, by Adam.", POSITIVE)

    key_start: str = setting(
        "random",
        'Where a key begins: at random, as in the paper, or with "query" along the mean query of its task\'s inputs, '
        "with as large a share of them as the mean of the earlier slots.",
        choices=("random", "query"),
    )
    young_steps: int = setting(
        0,
        "First updates of a task in which its block has a share of at least 1 / tasks so far, which falls to nothing "
        "over them; not in the paper.",
        NOT_NEGATIVE,
    )

    mixing: ClassVar[str] = "attention"
    pass_after: ClassVar[str | None] = "dev"

    @property
    def samples(self) -> str | None:
        return "inputs" if self.kl_ratio > 0 and not self.statistics else None

    @property
    def features_after(self) -> bool:
        return self._draws_from_gaussians

    @property
    def rows_before(self) -> int:
        return WARM_START_ROWS if self.warm_start_steps or self.key_start == "query" else 0

    @property
    def routes(self) -> bool:
        return self.selection == "attention"

    def old_data(self, source: str) -> str:
        return "statistics" if self._draws_from_gaussians else super().old_data(source)

    def uses(self, hook: str) -> bool:
        return super().uses(hook) and (hook != "penalty" or self.kl_ratio > 0)

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        width = state.width_of(parameters)
        kept = {
            "keys": Leaf((capacity, width), (state.TASKS, "query")),
            "reflection_targets": Leaf((capacity, capacity), (state.TASKS, state.TASKS)),
        }
        if self._draws_from_gaussians:
            kept["statistics"] = gaussians.leaves(capacity, width, self.statistics)
        return kept

    def selector(self, parameters: Parameters) -> Tree:
        width = state.width_of(parameters)
        pooled, keys = jax.ShapeDtypeStruct((1, width), jnp.float32), jax.ShapeDtypeStruct((1, width), jnp.float32)
        active, slot = jax.ShapeDtypeStruct((1,), jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32)
        return state.declare(self._attention(), pooled, keys, active, slot)

    def features(self, apply: Apply, base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        """The maximum of the token embeddings [B, D]."""
        return max_over_tokens(apply(base, source, method="embed"), source_mask, self.pool_padding)

    def begin_task(
        self, rng: jax.Array, leaves: Trainable, frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task
    ) -> Trainable:
        """A fresh block and key, the query projection of the task before, and the warm start."""
        fresh_rng, warm_rng = jax.random.split(rng)
        fresh = state.start(fresh_rng, leaves, frozen.base)
        if previous is not None:
            kept = previous.selector["query_projection"]
            fresh = fresh.replace(selector={**fresh.selector, "query_projection": kept})
        if self.key_start == "query":
            fresh = fresh.replace(selector=self._along_mean_query(frozen, fresh.selector, seen, task))
        if not self.warm_start_steps:
            return fresh
        return fresh.replace(selector=self.warm_start(warm_rng, frozen, fresh, seen, task))

    def warm_start(self, rng: jax.Array, frozen: Frozen, trainable: Trainable, seen: Seen, task: Task) -> Tree:
        """The selector, moved by Adam until the task's inputs attend to its slot and earlier ones do not.

        The loss is -log of the new slot's attention, mean over `seen.features`, plus the reflection loss. Not in the
        paper. A fresh block is empty, so at first only the reflection loss pulls at the attention, and it shuts the
        new slot; near zero, nothing is left to open it. At the paper's low rate and thousands of steps the block is
        useful before that happens; a short run with a high rate needs the start.
        """
        optimizer, rows = optax.adam(self.warm_start_learning_rate), seen.features
        if rows is None:
            raise ValueError("the warm start needs features of the task's inputs")

        def loss(selector: Tree, rng: jax.Array) -> jax.Array:
            moved = trainable.replace(selector=selector)
            own = jnp.take(self.log_weights(frozen, moved, rows, task), task.slot, axis=-1)
            reflection = self.penalty(rng, frozen, moved, seen.samples, task)[0] if self.uses("penalty") else 0.0
            return reflection - own.mean()

        def update(carry, rng):
            selector, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(selector, rng), opt_state)
            return (optax.apply_updates(selector, updates), opt_state), None

        rngs = jax.random.split(rng, self.warm_start_steps)
        (selector, _), _ = jax.lax.scan(update, (trainable.selector, optimizer.init(trainable.selector)), rngs)
        return selector

    def log_weights(self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task) -> jax.Array:
        """Log attention [..., T] of features [..., D]."""
        arguments = (features, frozen.memory["keys"], state.active_slots(frozen, task), task.slot)
        return cast(jax.Array, self._attention().apply({"params": trainable.selector}, *arguments))

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        kind = self.learning if training else self.selection
        active = state.active_slots(frozen, task)
        if kind == "attention":
            attention = jnp.exp(self.log_weights(frozen, trainable, features, task))
            if not (training and self.young_steps) or task.step is None:
                return attention
            youth = jnp.maximum(1 - task.step / self.young_steps, 0.0)
            floor = youth / jnp.maximum(active.sum(), 1)
            return (1 - floor) * attention + floor * own_slot(frozen, features, task.slot)
        if kind == "own":
            return own_slot(frozen, features, task.slot) * active
        return jnp.broadcast_to(active / jnp.maximum(active.sum(), 1), (*features.shape[:-1], active.shape[0]))

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        """kl_ratio times the reflection loss over drawn pseudo-samples; without `task.step`, as after the first."""
        features, valid = self._reflected(rng, frozen, samples)
        # A withdrawn slot takes no part: what was recorded on it is spread over the others.
        targets = frozen.memory["reflection_targets"] * frozen.enabled
        targets = targets / jnp.maximum(targets.sum(axis=1, keepdims=True), 1e-9)
        current = self.log_weights(frozen, trainable, features, task)
        total, by_task = reflection_loss(targets, current, valid, task.slot)
        loss = self.kl_ratio * total
        if not self.reflect_in_first_update and task.step is not None:
            loss = loss * (task.step > 0)
        return loss, {"reflection_loss": total, "reflection_by_task": by_task}

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """The attention of a batch's inputs, summed over rows, and their number."""
        features = self.features(apply, frozen.base, batch["source"], batch["source_mask"])
        attention = jnp.exp(self.log_weights(frozen, trainable, features, task))
        real = real_rows(batch)
        return {"attention": jnp.sum(attention * real[:, None], axis=0), "rows": jnp.sum(real)}

    def summarise(self, memory: Tree, totals: Tree) -> Tree:
        """The task's reflection target [T], and with `statistics` the Gaussian of its training inputs."""
        target = totals["attention"] / np.maximum(totals["rows"], 1)
        found = {"target": target.astype(jnp.bfloat16).astype(np.float64) if self.round_targets else target}
        if self._draws_from_gaussians:
            found["statistics"] = gaussians.fit(totals["features"], self.statistics)
        return found

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """Block, key, reflection target and statistics become part of the frozen tree."""
        if found is None:
            raise ValueError("a task cannot end before its attention was measured")
        row = {"keys": trainable.selector["key"], "reflection_targets": found["target"]}
        if self._draws_from_gaussians:
            if "statistics" not in found:
                raise ValueError(
                    'config.pseudo_samples.source="statistics" needs those of every task, which only a run that '
                    "trained it has: choose another source."
                )
            row["statistics"] = found["statistics"]
        memory = jax.tree.map(
            lambda kept, own: jax.lax.dynamic_update_index_in_dim(kept, own, task.slot, 0), frozen.memory, row
        )
        return super().end_task(frozen, trainable, found, task).replace(memory=memory)

    def told(self, memory: Tree) -> dict[str, Any]:
        return {"reflection_targets": memory["reflection_targets"]}

    def moved(self, memory: Tree, weights: np.ndarray, slot: int) -> float | None:
        """The mean KL of the task's reflection target from the attention of its inputs: what reflection holds small."""
        if self.selection != "attention":
            return None
        # Weights of a shorter order have fewer slots; the others were empty.
        target = np.asarray(memory["reflection_targets"][slot], np.float64)[: weights.shape[1]]
        seen = target > 0
        log_weights = np.log(np.maximum(weights[:, seen], LEAST_ATTENTION))
        return float(np.mean(np.sum(target[seen] * (np.log(target[seen]) - log_weights), axis=1)))

    def warning(self, logs: Mapping[str, np.ndarray], slot: int) -> str | None:
        if logs["attention"][slot] >= CLOSED_GATE:
            return None
        return (
            f"the mean attention on the new slot stayed under {CLOSED_GATE:.0%}, so older blocks learned the task. "
            "Raise config.sapt.warm_start_steps, or lower config.sapt.kl_ratio."
        )

    def _along_mean_query(self, frozen: Frozen, selector: Tree, seen: Seen, task: Task) -> Tree:
        """The selector with its key along the mean query of the task's inputs; a first task's stays as it is.

        Its length lets the mean log odds of the new slot against the t - 1 earlier ones together be -log(t - 1): a
        share of 1 / t, where a key of U(-1, 1) begins anywhere, and the warm start ends near 1.
        """
        if seen.features is None:
            raise ValueError("a key along the mean query needs features of the task's inputs")
        projection = QueryProjection(self.query_hidden, self.query_init_std)
        queries = cast(jax.Array, projection.apply({"params": selector["query_projection"]}, seen.features))
        earlier, scale = state.earlier_slots(frozen, task), self.temperature * queries.shape[-1] ** 0.5
        scores = jnp.where(earlier, queries @ frozen.memory["keys"].T / scale, -jnp.inf)
        wanted = jnp.mean(jax.nn.logsumexp(scores, axis=-1)) - jnp.log(earlier.sum())
        mean = queries.mean(axis=0)
        key = mean * wanted * scale / jnp.maximum(mean @ mean, 1e-9)
        return {**selector, "key": jnp.where(earlier.any(), key, selector["key"])}

    @property
    def _draws_from_gaussians(self) -> bool:
        return self.kl_ratio > 0 and self.statistics > 0

    def _reflected(self, rng: jax.Array, frozen: Frozen, samples: Samples | None) -> tuple[jax.Array, jax.Array]:
        """Features [T, N, D] that stand for each task's inputs in a step, and which of them count [T, N]."""
        capacity = frozen.enabled.shape[0]
        shape = (capacity, self.reflection_batch)
        if self._draws_from_gaussians:
            drawn = gaussians.draw(rng, frozen.memory["statistics"], self.reflection_batch)
            return drawn, jnp.ones(shape, jnp.bool_)
        if samples is None:
            raise ValueError("the reflection loss needs pseudo-samples")
        rows = jax.random.randint(rng, shape, 0, jnp.maximum(samples.counts, 1)[:, None])
        rows = jnp.minimum(rows, samples.features.shape[1] - 1)
        valid = jnp.broadcast_to((samples.counts > 0)[:, None], shape)
        return jnp.take_along_axis(samples.features, rows[..., None], axis=1), valid

    def _attention(self) -> SharedAttention:
        return SharedAttention(self.query_hidden, self.query_init_std, self.temperature)
