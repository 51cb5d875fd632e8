"""SAPT: shared attentive learning and selection (SALS) with attentive reflection (ARM), arXiv 2401.08295."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapt_jax import losses
from sapt_jax.methods import shared_attention
from sapt_jax.methods.base import Pools
from sapt_jax.pet import Mixture, Pet, Sites
from sapt_jax.state import Frozen, Trainable, active_slots, insert

# "attention" is the paper's shared attention. "own" trains each block alone, so that only the warm start and the
# reflection loss move the attention; "mean" mixes all blocks alike.
LEARNING = ("attention", "own", "mean")
SELECTION = ("attention", "mean")


@dataclasses.dataclass(frozen=True)
class Sapt:
    """Every task opens a block and a key of its own; one attention over all keys mixes the blocks.

    Attributes:
      pet: the kind of block.
      query_hidden: width between the two matrices of the query projection (100 in the paper).
      query_init_std: None for uniform initialisation by fan-in, else the standard deviation of a normal one.
      temperature: multiplies sqrt(D) under the attention scores.
      pool_padding: see `shared_attention.pool`.
      learning, selection: what mixes the blocks in training (one of `LEARNING`) and at test time (`SELECTION`).
      kl_ratio: weight of the reflection loss; 0 turns ARM off.
      reflection_batch: pseudo-samples of each earlier task that a step draws.
      warm_start_steps, warm_start_learning_rate: see `warm_start`; 0 steps is the paper.
    """

    pet: Pet
    query_hidden: int
    query_init_std: float | None
    temperature: float
    pool_padding: bool
    learning: str
    selection: str
    kl_ratio: float
    reflection_batch: int
    warm_start_steps: int
    warm_start_learning_rate: float

    @property
    def uses_pseudo_samples(self) -> bool:
        return self.kl_ratio > 0

    def capacity(self, num_tasks: int) -> int:
        return num_tasks

    def slot_index(self, task_index: int) -> int:
        return task_index

    def open_task(self, rng: jax.Array, sites: Sites, table: jax.Array, previous: Trainable | None) -> Trainable:
        """A fresh block and key; the query projection goes on from the task before."""
        slot_rng, key_rng, projection_rng = jax.random.split(rng, 3)
        d_model = table.shape[1]
        if previous is None:
            projection = shared_attention.init_query_projection(
                projection_rng, d_model, self.query_hidden, self.query_init_std
            )
        else:
            projection = previous.query_projection
        slot = self.pet.init_block(slot_rng, sites, table)
        return Trainable(slot, shared_attention.init_key(key_rng, d_model), projection)

    def warm_start(
        self,
        rng: jax.Array,
        frozen: Frozen,
        trainable: Trainable,
        inputs: jax.Array,
        pools: Pools,
        slot_index: jax.Array,
    ) -> Trainable:
        """Moves key and query projection by Adam until the task's inputs attend to its slot and earlier ones do not.

        The loss is -log of the new slot's attention, mean over `inputs`, plus the reflection loss. Not in the paper,
        where the new slot is opened by the task loss alone: that needs the block to be useful before the reflection
        loss has shut the slot.
        """
        if not self.warm_start_steps:
            return trainable
        optimizer = optax.adam(self.warm_start_learning_rate)

        def loss(attention, rng):
            moved = trainable.replace(key=attention[0], query_projection=attention[1])
            own = jnp.take(self.log_weights(frozen, moved, inputs, slot_index), slot_index, axis=-1)
            return self.auxiliary_loss(rng, frozen, moved, pools, slot_index)[0] - own.mean()

        def update(carry, rng):
            attention, state = carry
            updates, state = optimizer.update(jax.grad(loss)(attention, rng), state)
            return (optax.apply_updates(attention, updates), state), None

        attention = (trainable.key, trainable.query_projection)
        rngs = jax.random.split(rng, self.warm_start_steps)
        (attention, _), _ = jax.lax.scan(update, (attention, optimizer.init(attention)), rngs)
        return trainable.replace(key=attention[0], query_projection=attention[1])

    def log_weights(self, frozen: Frozen, trainable: Trainable, pooled: jax.Array, slot_index: jax.Array) -> jax.Array:
        _, keys = insert(frozen, trainable, slot_index)
        query = shared_attention.make_query(trainable.query_projection, pooled)
        return shared_attention.log_weights(query, keys, active_slots(frozen, slot_index), self.temperature)

    def learning_weights(
        self, frozen: Frozen, trainable: Trainable, pooled: jax.Array, slot_index: jax.Array
    ) -> jax.Array:
        return self._weights(self.learning, frozen, trainable, pooled, slot_index)

    def selection_weights(
        self, frozen: Frozen, trainable: Trainable, pooled: jax.Array, slot_index: jax.Array
    ) -> jax.Array:
        return self._weights(self.selection, frozen, trainable, pooled, slot_index)

    def _weights(self, kind, frozen, trainable, pooled, slot_index):
        if kind == "attention":
            return jnp.exp(self.log_weights(frozen, trainable, pooled, slot_index))
        slots = active_slots(frozen, slot_index)
        if kind == "own":
            slots = slots & (jnp.arange(slots.shape[0]) == slot_index)
        return jnp.broadcast_to(slots / jnp.maximum(slots.sum(), 1), (*pooled.shape[:-1], slots.shape[0]))

    def mixture(self, frozen: Frozen, trainable: Trainable, weights: jax.Array, slot_index: jax.Array) -> Mixture:
        bank, _ = insert(frozen, trainable, slot_index)
        return self.pet.mix(bank, weights, slot_index)

    def auxiliary_loss(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, pools: Pools, slot_index: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """kl_ratio * sum over earlier tasks of KL(recorded attention || current), over drawn pseudo-samples."""
        capacity, size = pools.pooled.shape[:2]
        if not self.uses_pseudo_samples:
            return jnp.zeros(()), {"reflection_loss": jnp.zeros(()), "reflection_by_task": jnp.zeros((capacity,))}
        drawn = jax.random.randint(rng, (capacity, self.reflection_batch), 0, jnp.maximum(pools.counts, 1)[:, None])
        pooled = jnp.take_along_axis(pools.pooled, jnp.minimum(drawn, size - 1)[..., None], axis=1)
        valid = jnp.broadcast_to((pools.counts > 0)[:, None], drawn.shape)
        # A withdrawn slot takes no part: what was recorded on it is spread over the others.
        targets = frozen.targets * frozen.enabled
        targets = targets / jnp.maximum(targets.sum(axis=1, keepdims=True), 1e-9)
        current = self.log_weights(frozen, trainable, pooled, slot_index)
        total, by_task = losses.reflection_loss(targets, current, valid, slot_index)
        return self.kl_ratio * total, {"reflection_loss": total, "reflection_by_task": by_task}
