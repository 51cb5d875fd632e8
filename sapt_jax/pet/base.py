"""Parameter-efficient (PET) blocks and their mixture: LoRA and soft prompts.

The blocks of all task slots lie in one tree of arrays, the bank, each with a task axis T of its own:

LoRA, for each adapted projection of a stack of layers: `a` [layers, D, T, R], `b` [layers, T, R, H]. The mixture of all
blocks is then one LoRA of rank T*R, and reaching that form is a reshape that moves no data (SAPT, section 3.2: the
weighted sum of the blocks' outputs).

Soft prompts: `prompt` [T, P, D]. The mixture is the weighted sum of the prompts, put before the input's embeddings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

# sites: {stack: {attention: {projection: (layers, fan_in, fan_out)}}}, declared by each model.
Sites = Mapping[str, Mapping[str, Mapping[str, tuple[int, int, int]]]]

TASK_AXIS = {"a": 2, "b": 1, "prompt": 0}


@struct.dataclass
class Mixture:
    """Everything a model needs to apply PET to one batch: blocks and columns for LoRA, or a prompt.

    Attributes:
      blocks: {stack: {attention: {projection: {"a": [layers, D, T*R], "b": [layers, T*R, H]}}}}, or None.
      columns: [B, T*R], the scaled attention weight of every rank-one column, for each instance, or None.
      slot_columns: [T*R] bool, True on the slot's columns, or None. When given, gradients reach the layers
        below through the slot alone, as in the paper's released code.
      prompt: [B, P, D], or None.
    """

    blocks: Any = None
    columns: jax.Array | None = None
    slot_columns: jax.Array | None = None
    prompt: jax.Array | None = None

    def for_answers(self, answers: int) -> "Mixture":
        """The mixture of a decode step with `answers` rows for each source; the prompt is in the cache by then."""
        columns = None if self.columns is None else jnp.repeat(self.columns, answers, axis=0)
        return self.replace(columns=columns, prompt=None)


def layer_blocks(mixture: Mixture | None, *path: str) -> tuple[Any, Mixture | None]:
    """(The LoRA blocks of the layers at `path`, what all layers share of the mixture); (None, None) without LoRA."""
    if mixture is None or mixture.blocks is None:
        return None, None
    blocks = mixture.blocks
    for name in path:
        blocks = blocks[name]
    return blocks, mixture.replace(blocks=None)


def put_prompt_before(mixture: Mixture | None, embeddings: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """embeddings [B, L, D] and mask [B, L] with the mixture's prompt before them, [B, P + L, ...]; as is without one.

    Between the prompt and a left-padded input lies the padding, which the mask hides and positions do not count.
    """
    if mixture is None or mixture.prompt is None:
        return embeddings, mask
    prompt = mixture.prompt.astype(embeddings.dtype)
    seen = jnp.ones(prompt.shape[:2], mask.dtype)
    return jnp.concatenate([prompt, embeddings], axis=1), jnp.concatenate([seen, mask], axis=1)


class Pet(Protocol):
    """A kind of PET block."""

    prompt_length: int

    def init_block(self, rng: jax.Array, sites: Sites, table: jax.Array) -> Any:
        """A fresh block in float32. `table` [V, D] holds the model's token embeddings."""

    def init_bank(self, sites: Sites, d_model: int, capacity: int) -> Any:
        """An empty bank of `capacity` slots, all zero."""

    def mix(self, bank: Any, weights: jax.Array, slot_index: jax.Array) -> Mixture:
        """The mixture of all blocks in the bank under `weights` [B, T], zero on slots that take no part."""


def _is_site(x: Any) -> bool:
    return isinstance(x, tuple)


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA on the query and value projections of every attention (arXiv 2106.09685).

    Attributes:
      rank, alpha: every block is scaled by alpha / rank.
      stop_gradient_through_bank: gradients reach the layers below through the current block alone.
    """

    rank: int
    alpha: float
    stop_gradient_through_bank: bool

    prompt_length = 0

    def init_block(self, rng: jax.Array, sites: Sites, table: jax.Array) -> Any:
        """`a` [layers, D, R] ~ U(-1/sqrt(D), 1/sqrt(D)), `b` [layers, R, H] = 0 (Kaiming-uniform, LoRA's release)."""
        del table
        leaves, treedef = jax.tree.flatten(sites, is_leaf=_is_site)
        blocks = []
        for key, (layers, fan_in, fan_out) in zip(jax.random.split(rng, len(leaves)), leaves, strict=True):
            bound = fan_in**-0.5
            a = jax.random.uniform(key, (layers, fan_in, self.rank), jnp.float32, -bound, bound)
            blocks.append({"a": a, "b": jnp.zeros((layers, self.rank, fan_out), jnp.float32)})
        return jax.tree.unflatten(treedef, blocks)

    def init_bank(self, sites: Sites, d_model: int, capacity: int) -> Any:
        """Leaves {"a": [layers, D, T, R], "b": [layers, T, R, H]}."""

        def empty(site):
            layers, fan_in, fan_out = site
            return {
                "a": jnp.zeros((layers, fan_in, capacity, self.rank), jnp.float32),
                "b": jnp.zeros((layers, capacity, self.rank, fan_out), jnp.float32),
            }

        return jax.tree.map(empty, sites, is_leaf=_is_site)

    def mix(self, bank: Any, weights: jax.Array, slot_index: jax.Array) -> Mixture:
        """A mixture whose output, added to W x, is sum_t weights[:, t] * (alpha / R) * (x A_t) B_t."""

        def flatten(path, leaf):
            axis = _task_axis(path)
            return leaf.reshape(leaf.shape[:axis] + (-1,) + leaf.shape[axis + 2 :])

        columns = jnp.repeat(weights, self.rank, axis=1) * (self.alpha / self.rank)
        slot_columns = None
        if self.stop_gradient_through_bank:
            slot_columns = jnp.repeat(jnp.arange(weights.shape[1]) == slot_index, self.rank)
        return Mixture(jax.tree_util.tree_map_with_path(flatten, bank), columns, slot_columns)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """`prompt_length` vectors before the input's embeddings (prompt tuning, arXiv 2104.08691).

    They go before the encoder's input in T5, before the whole sequence in LLaMA. The query never sees them.
    """

    prompt_length: int

    def init_block(self, rng: jax.Array, sites: Sites, table: jax.Array) -> Any:
        """{"prompt": [P, D]}, the embeddings of tokens drawn uniformly from the vocabulary."""
        del sites
        drawn = jax.random.randint(rng, (self.prompt_length,), 0, table.shape[0])
        return {"prompt": jnp.take(table, drawn, axis=0).astype(jnp.float32)}

    def init_bank(self, sites: Sites, d_model: int, capacity: int) -> Any:
        """{"prompt": [T, P, D]}."""
        del sites
        return {"prompt": jnp.zeros((capacity, self.prompt_length, d_model), jnp.float32)}

    def mix(self, bank: Any, weights: jax.Array, slot_index: jax.Array) -> Mixture:
        """A mixture with the prompt sum_t weights[:, t] P_t."""
        del slot_index
        return Mixture(prompt=jnp.einsum("BT,TPD->BPD", weights, bank["prompt"]))


def _task_axis(path: tuple) -> int:
    return TASK_AXIS[path[-1].key]


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
