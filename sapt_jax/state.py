"""The two state trees of continual learning: what stays as it is, and what the current task may change."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sapt_jax import pet


@struct.dataclass
class Frozen:
    """Everything that the current task must not change. T is the capacity of the bank.

    Attributes:
      base: the pretrained model's parameters.
      bank: PET blocks of all task slots (see `pet`), zero in slots not yet committed.
      keys: [T, D] float32.
      targets: [T, T] float32, row i the mean attention of task i just after it was learned, zero on later slots.
      enabled: [T] bool, False on tasks withdrawn from the mixture.
    """

    base: Any
    bank: Any
    keys: jax.Array
    targets: jax.Array
    enabled: jax.Array


@struct.dataclass
class Trainable:
    """What the current task trains: its block, its key [D], and the query projection that all tasks share."""

    slot: Any
    key: jax.Array
    query_projection: dict[str, jax.Array]


def init_frozen(base: Any, kind: pet.Pet, sites: pet.Sites, d_model: int, capacity: int) -> Frozen:
    """An empty bank around a pretrained model."""
    return Frozen(
        base=base,
        bank=kind.init_bank(sites, d_model, capacity),
        keys=jnp.zeros((capacity, d_model), jnp.float32),
        targets=jnp.zeros((capacity, capacity), jnp.float32),
        enabled=jnp.ones((capacity,), bool),
    )


def insert(frozen: Frozen, trainable: Trainable, slot_index: jax.Array) -> tuple[Any, jax.Array]:
    """Bank and keys with the current block and key at `slot_index`; gradients reach these two alone."""
    bank = pet.write_slot(frozen.bank, trainable.slot, slot_index)
    keys = jax.lax.stop_gradient(frozen.keys)
    return bank, jax.lax.dynamic_update_index_in_dim(keys, trainable.key, slot_index, 0)


def commit(frozen: Frozen, trainable: Trainable, target: jax.Array, slot_index: jax.Array) -> Frozen:
    """Ends a task: its block, key and recorded attention `target` [T] become part of the frozen tree."""
    bank, keys = insert(frozen, trainable, slot_index)
    targets = jax.lax.dynamic_update_index_in_dim(frozen.targets, target, slot_index, 0)
    return frozen.replace(bank=bank, keys=keys, targets=targets)


def grow(frozen: Frozen, capacity: int) -> Frozen:
    """The frozen tree with empty slots appended up to `capacity`; nothing already learned changes."""
    room = capacity - frozen.keys.shape[0]
    return frozen.replace(
        bank=pet.grow(frozen.bank, capacity),
        keys=jnp.pad(frozen.keys, ((0, room), (0, 0))),
        targets=jnp.pad(frozen.targets, ((0, room), (0, room))),
        enabled=jnp.pad(frozen.enabled, (0, room), constant_values=True),
    )


def active_slots(frozen: Frozen, slot_index: jax.Array) -> jax.Array:
    """[T] bool: slots learned so far, the current one included, less those withdrawn."""
    return (jnp.arange(frozen.keys.shape[0]) <= slot_index) & frozen.enabled
