"""The matrix FLOPs that a model asks for, counted by hand: two for each multiply-add, nothing computed twice.

A training step goes forward once. Back, the frozen matrices pass the gradient on but have none of their own: as many
FLOPs as forward. The two products of attention and those of the LoRA blocks differentiate both sides: twice as many.
What rematerialisation computes again is no work of the model. Attention counts all pairs of positions, as in PaLM
(arXiv 2204.02311, appendix B). The query projection, below a thousandth, is left out.
"""

import dataclasses
import math

import flax.linen as nn
from flax.traverse_util import flatten_dict

from sapt_jax.models.families import family_of, parameters
from sapt_jax.models.work import Work
from sapt_jax.pet import Mixture


@dataclasses.dataclass(frozen=True)
class Matmuls:
    """FLOPs of a forward pass: with frozen matrices, between activations, and with LoRA blocks."""

    frozen: int
    attention: int
    adapters: int

    @property
    def forward(self) -> int:
        return self.frozen + self.attention + self.adapters

    @property
    def train(self) -> int:
        return 2 * self.frozen + 3 * self.attention + 3 * self.adapters


def teacher_forced(model: nn.Module, mixture: Mixture, source: int, target: int) -> Matmuls:
    """One row of a training batch.

    Args:
      model: of `models.families`.
      mixture: arrays or `jax.ShapeDtypeStruct`s.
      source, target: tokens of the row, without the mixture's prompt.
    """
    work = family_of(model.config).teacher_forced(model.config, source + _prompt_length(mixture), target)
    return _matmuls(model, mixture, work)


def decoded(model: nn.Module, mixture: Mixture, source: int, new_tokens: int, beams: int) -> Matmuls:
    """One answer of `new_tokens` to `source` tokens with a cache of its final length; `teacher_forced`'s arguments."""
    work = family_of(model.config).decoded(model.config, source + _prompt_length(mixture), new_tokens, beams)
    return _matmuls(model, mixture, work)


def _prompt_length(mixture: Mixture) -> int:
    return 0 if mixture.prompt is None else mixture.prompt.shape[1]


def _matmuls(model: nn.Module, mixture: Mixture, work: Work) -> Matmuls:
    shape, blocks = model.config, flatten_dict(mixture.blocks or {}, sep="/")
    kernels = {path: math.prod(parameter.shape) for path, parameter in parameters(model).items()}
    # A block's two factors, .../a and .../b, are applied where their module's kernel is.
    factors = [(f"{path.rpartition('/')[0]}/kernel", math.prod(leaf.shape)) for path, leaf in blocks.items()]
    return Matmuls(
        frozen=2 * sum(size * work.positions(path) for path, size in kernels.items()),
        attention=4 * work.pairs * shape.num_heads * shape.head_dim,
        adapters=2 * sum(size * work.positions(path) for path, size in factors),
    )
