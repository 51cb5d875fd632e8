"""What every kind of parameter-efficient (PET) block has in common, and the mixture that a model is given.

The blocks of all task slots lie in one tree of arrays, the bank: each array of a block with a task axis T more.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from sapt_jax.state import Parameters, Tree


class Mixture(struct.PyTreeNode):
    """Everything a model needs to apply PET to one batch: blocks and columns for LoRA, or a prompt.

    Attributes:
      blocks: LoRA's factors, nested as the base tree is down to the module that holds the adapted kernel:
        {"decoder": {"layers": {"self_attention": {"query": {"a": [layers, D, T*R], "b": [layers, T*R, H]}}}}}, or None.
      columns: [B, T*R], the scaled attention weight of every rank-one column, for each instance, or None.
      slot_columns: [T*R] bool, True on the slot's columns, or None. When given, gradients reach the layers
        below through the slot alone, as in the paper's released code.
      prompt: [B, P, D], or None. P may be the length of several prompts in a row.
      prompt_mask: [B, P] bool, False on vectors that take no part, or None where all do. In T5 a distance counts all
        vectors between, so that those must lie to the left of all others.
      tokens: [B, L] bool, True where the input of the layers at hand is of tokens, or None where nobody asks.
    """

    blocks: Any = None
    columns: jax.Array | None = None
    slot_columns: jax.Array | None = None
    prompt: jax.Array | None = None
    prompt_mask: jax.Array | None = None
    tokens: jax.Array | None = None

    def for_answers(self, answers: int) -> "Mixture":
        """The mixture of a decode step with `answers` rows for each source; the prompt is in the cache by then."""
        columns = None if self.columns is None else jnp.repeat(self.columns, answers, axis=0)
        return self.replace(columns=columns, prompt=None, prompt_mask=None)


def layer_blocks(mixture: Mixture | None, *path: str) -> tuple[Any, Mixture | None]:
    """(The LoRA blocks of the layers at `path`, what all layers share of the mixture); (None, None) without LoRA."""
    if mixture is None or mixture.blocks is None:
        return None, None
    blocks = mixture.blocks
    for name in path:
        blocks = blocks.get(name) if blocks else None
    return blocks, mixture.replace(blocks=None)


def at_tokens(mixture: Mixture | None, tokens: jax.Array) -> Mixture | None:
    """The mixture for layers whose inputs are of these tokens [B, L]."""
    return None if mixture is None else mixture.replace(tokens=tokens)


def put_prompt_before(mixture: Mixture | None, embeddings: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """embeddings [B, L, D] and mask [B, L] with the mixture's prompt before them, [B, P + L, ...]; as is without one.

    Between the prompt and a left-padded input lies the padding, which the mask hides and positions do not count.
    """
    if mixture is None or mixture.prompt is None:
        return embeddings, mask
    prompt = mixture.prompt.astype(embeddings.dtype)
    seen = jnp.ones(prompt.shape[:2], bool) if mixture.prompt_mask is None else mixture.prompt_mask
    return jnp.concatenate([prompt, embeddings], axis=1), jnp.concatenate([seen.astype(mask.dtype), mask], axis=1)


@dataclasses.dataclass(frozen=True)
class Pet(abc.ABC):
    """A kind of PET block.

    `kind` is its name in the config. `task_axes` says, for the name of each array of a block, where the bank has its
    task axis. `prompt_length` is how many vectors a block puts before an input.
    """

    kind: ClassVar[str]
    task_axes: ClassVar[Mapping[str, int]]

    @property
    def prompt_length(self) -> int:
        return 0

    @abc.abstractmethod
    def block(self, parameters: Parameters) -> Tree:
        """The leaves (`state.Leaf`) of one block on a model with these parameters.

        Raises:
          ValueError: the kind does not go with the model.
        """

    @abc.abstractmethod
    def mix(self, bank: Tree, weights: jax.Array, slot: jax.Array) -> Mixture:
        """The mixture of all blocks in the bank under `weights` [B, T], zero on slots that take no part.

        Args:
          slot: [] the slot in training.
        """

    def write(self, bank: Tree, block: Tree, slot: Any) -> Tree:
        """The bank with a block at a slot (traced, so that every task shares one program).

        Gradients reach the block alone.
        """

        def write(path, stored, new):
            axis = self._task_axis(path)
            stored = jax.lax.stop_gradient(stored)
            return jax.lax.dynamic_update_index_in_dim(stored, jnp.expand_dims(new, axis), slot, axis)

        return jax.tree_util.tree_map_with_path(write, bank, block)

    def read(self, bank: Tree, slot: Any) -> Tree:
        """The block stored at a slot of the bank."""

        def read(path, stored):
            return jax.lax.dynamic_index_in_dim(stored, slot, self._task_axis(path), keepdims=False)

        return jax.tree_util.tree_map_with_path(read, bank)

    def _task_axis(self, path: tuple) -> int:
        return self.task_axes[path[-1].key]
