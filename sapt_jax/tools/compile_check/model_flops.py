"""The matrix FLOPs that a model asks for, counted by hand: two for each multiply-add, nothing computed twice.

A training step goes forward once. Back, the frozen matrices pass the gradient on but have none of their own: as many
FLOPs as forward. The two products of attention and those of the LoRA blocks differentiate both sides: twice as many.
What rematerialisation computes again is no work of the model. Attention counts all pairs of positions, as in PaLM
(arXiv 2204.02311, appendix B). The query projection, below a thousandth, is left out.
"""

import dataclasses
from typing import Any

from sapt_jax.models.shapes import T5Config
from sapt_jax.pet import Pet


@dataclasses.dataclass(frozen=True)
class Matmuls:
    """FLOPs of a forward pass: with frozen matrices, between activations, and with LoRA blocks."""

    frozen: int = 0
    attention: int = 0
    adapters: int = 0

    def __add__(self, other: "Matmuls") -> "Matmuls":
        return Matmuls(self.frozen + other.frozen, self.attention + other.attention, self.adapters + other.adapters)

    def times(self, n: int) -> "Matmuls":
        """`n` of them."""
        return Matmuls(self.frozen * n, self.attention * n, self.adapters * n)

    @property
    def forward(self) -> int:
        return self.frozen + self.attention + self.adapters

    @property
    def train(self) -> int:
        return 2 * self.frozen + 3 * self.attention + 3 * self.adapters


def _attention(shape: Any, columns: int, queries: int, keys: int, projected_keys: int) -> Matmuls:
    """Projections and products of one attention over `keys` positions, of which `projected_keys` are new."""
    d = shape.d_model
    width = shape.num_heads * shape.head_dim
    kv_width = getattr(shape, "num_kv_heads", shape.num_heads) * shape.head_dim
    return Matmuls(
        frozen=2 * d * (2 * width * queries + 2 * kv_width * projected_keys),
        attention=4 * queries * keys * width,
        adapters=2 * columns * ((d + width) * queries + (d + kv_width) * projected_keys),
    )


def _mlp(shape: Any, positions: int) -> Matmuls:
    matrices = 3 if getattr(shape, "gated", True) else 2
    return Matmuls(frozen=2 * matrices * shape.d_model * shape.d_ff * positions)


def _head(shape: Any, positions: int) -> Matmuls:
    return Matmuls(frozen=2 * shape.d_model * shape.vocab_size * positions)


def _columns(pet: Pet, capacity: int) -> int:
    return getattr(pet, "rank", 0) * capacity


def teacher_forced(shape: Any, pet: Pet, capacity: int, source: int, target: int) -> Matmuls:
    """One row of a training batch: `source` and `target` tokens, a bank of `capacity` blocks."""
    columns, source = _columns(pet, capacity), source + pet.prompt_length
    if isinstance(shape, T5Config):
        self_attention = _attention(shape, columns, target, target, target)
        cross = _attention(shape, columns, target, source, source)
        decoder = self_attention + cross + _mlp(shape, target)
        return _encoder(shape, columns, source) + decoder.times(shape.num_decoder_layers) + _head(shape, target)
    positions = source + target - 1
    layer = _attention(shape, columns, positions, positions, positions) + _mlp(shape, positions)
    return layer.times(shape.num_layers) + _head(shape, target)


def _encoder(shape: T5Config, columns: int, source: int) -> Matmuls:
    layer = _attention(shape, columns, source, source, source) + _mlp(shape, source)
    return layer.times(shape.num_encoder_layers)


def decoded(shape: Any, pet: Pet, capacity: int, source: int, new_tokens: int, beams: int) -> Matmuls:
    """One answer of `new_tokens` to `source` tokens, with a cache of the answer's final length."""
    columns, source = _columns(pet, capacity), source + pet.prompt_length
    steps = (new_tokens - 1) * beams
    if isinstance(shape, T5Config):
        self_attention = _attention(shape, columns, 1, new_tokens + 1, 1)
        layer = self_attention + _mlp(shape, 1)
        first = layer + _attention(shape, columns, 1, source, source)
        later = layer + _attention(shape, columns, 1, source, 0)
        decoder = (first + later.times(steps)).times(shape.num_decoder_layers)
        return _encoder(shape, columns, source) + decoder + _head(shape, 1 + steps)
    first = _attention(shape, columns, source, source, source) + _mlp(shape, source)
    later = _attention(shape, columns, 1, source + new_tokens, 1) + _mlp(shape, 1)
    return (first + later.times(steps)).times(shape.num_layers) + _head(shape, 1 + steps)
