"""Parameter-efficient (PET) blocks and their mixture.

A LoRA block holds, for each adapted projection of a stack of layers, `a` [layers, D, R] and `b` [layers, R, H].
The blocks of all task slots lie side by side in the bank, the task axis just before (`a`) or after (`b`) the rank:
`a` [layers, D, T, R], `b` [layers, T, R, H]. The mixture of all blocks is then one LoRA of rank T*R, and reaching that
form is a reshape that moves no data (SAPT, section 3.2: the weighted sum of the blocks' outputs).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# sites: {stack: {attention: {projection: (layers, fan_in, fan_out)}}}, declared by each model.
Sites = Mapping[str, Mapping[str, Mapping[str, tuple[int, int, int]]]]


@struct.dataclass
class Mixture:
    """Everything a model needs to apply PET to one batch.

    Attributes:
      blocks: {stack: {attention: {projection: {"a": [layers, D, T*R], "b": [layers, T*R, H]}}}}.
      columns: [B, T*R], the scaled attention weight of every rank-one column, for each instance.
      slot_columns: [T*R] bool, True on the slot's columns, or None. When given, gradients reach the layers
        below through the slot alone, as in the paper's released code.
    """

    blocks: Any
    columns: jax.Array
    slot_columns: jax.Array | None = None


def _is_site(x: Any) -> bool:
    return isinstance(x, tuple)


def init_block(rng: jax.Array, sites: Sites, rank: int) -> Any:
    """A fresh LoRA block: `a` ~ U(-1/sqrt(D), 1/sqrt(D)), `b` = 0 (Kaiming-uniform, a = sqrt(5), as LoRA's release).

    Returns:
      Tree like `sites` with leaves {"a": [layers, D, R], "b": [layers, R, H]} in float32.
    """
    leaves, treedef = jax.tree.flatten(sites, is_leaf=_is_site)
    blocks = []
    for key, (layers, fan_in, fan_out) in zip(jax.random.split(rng, len(leaves)), leaves, strict=True):
        bound = fan_in**-0.5
        a = jax.random.uniform(key, (layers, fan_in, rank), jnp.float32, -bound, bound)
        blocks.append({"a": a, "b": jnp.zeros((layers, rank, fan_out), jnp.float32)})
    return jax.tree.unflatten(treedef, blocks)


def init_bank(sites: Sites, rank: int, capacity: int) -> Any:
    """An empty bank of `capacity` slots: leaves {"a": [layers, D, T, R], "b": [layers, T, R, H]}, all zero."""

    def empty(site):
        layers, fan_in, fan_out = site
        return {
            "a": jnp.zeros((layers, fan_in, capacity, rank), jnp.float32),
            "b": jnp.zeros((layers, capacity, rank, fan_out), jnp.float32),
        }

    return jax.tree.map(empty, sites, is_leaf=_is_site)


def _task_axis(path: tuple) -> int:
    return {"a": 2, "b": 1}[path[-1].key]


def write_slot(bank: Any, slot: Any, task_index: jax.Array) -> Any:
    """The bank with `slot` at position `task_index` (traced, so that every task shares one program).

    Gradients reach the slot alone.
    """

    def write(path, stored, new):
        axis = _task_axis(path)
        stored = jax.lax.stop_gradient(stored)
        return jax.lax.dynamic_update_index_in_dim(stored, jnp.expand_dims(new, axis), task_index, axis)

    return jax.tree_util.tree_map_with_path(write, bank, slot)


def grow(bank: Any, capacity: int) -> Any:
    """The bank with empty slots appended up to `capacity`; what it holds stays as it is."""

    def append(path, stored):
        axis = _task_axis(path)
        room = [(0, capacity - stored.shape[axis]) if i == axis else (0, 0) for i in range(stored.ndim)]
        return jnp.pad(stored, room)

    return jax.tree_util.tree_map_with_path(append, bank)


def read_slot(bank: Any, task_index: jax.Array | int) -> Any:
    """The block stored at position `task_index` of the bank."""
    return jax.tree_util.tree_map_with_path(
        lambda path, stored: jax.lax.dynamic_index_in_dim(stored, task_index, _task_axis(path), keepdims=False), bank
    )


def mix(bank: Any, weights: jax.Array, alpha: float, slot_only_gradient_at: jax.Array | None = None) -> Mixture:
    """The mixture of all blocks in the bank under the attention weights.

    Args:
      bank: leaves `a` [layers, D, T, R], `b` [layers, T, R, H].
      weights: [B, T], zero on slots that take no part.
      alpha: LoRA's alpha; every block is scaled by alpha / R.
      slot_only_gradient_at: task index [] whose columns alone pass gradients to the layers below, or None.

    Returns:
      A `Mixture` whose output, added to W x, is sum_t weights[:, t] * (alpha / R) * (x A_t) B_t.
    """
    rank = jax.tree.leaves(bank)[0].shape[-1]

    def flatten(path, leaf):
        axis = _task_axis(path)
        return leaf.reshape(leaf.shape[:axis] + (-1,) + leaf.shape[axis + 2 :])

    columns = jnp.repeat(weights, rank, axis=1) * (alpha / rank)
    slot_columns = None
    if slot_only_gradient_at is not None:
        slot_columns = jnp.repeat(jnp.arange(weights.shape[1]) == slot_only_gradient_at, rank)
    return Mixture(jax.tree_util.tree_map_with_path(flatten, bank), columns, slot_columns)
