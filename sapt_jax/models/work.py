"""What a model of each family does for one row: at how many positions its kernels apply, and what attends to what."""

import dataclasses
import re

from sapt_jax.models.shapes import LlamaConfig, T5Config


@dataclasses.dataclass(frozen=True)
class Work:
    """A forward pass of one row, nothing computed twice.

    Attributes:
      kernels: (a regular expression over paths of the base tree, the positions at which those matrices are applied);
        of several that match, the first holds.
      pairs: pairs of a query's and a key's position, in all layers together.
    """

    kernels: tuple[tuple[str, int], ...]
    pairs: int

    def positions(self, path: str) -> int:
        """At how many positions the matrix at a path is applied; 0 for what is no matrix, as norms."""
        return next((count for pattern, count in self.kernels if re.fullmatch(pattern, path)), 0)


def llama_teacher_forced(shape: LlamaConfig, source: int, target: int) -> Work:
    """A row of `source` and `target` tokens."""
    length = source + target - 1
    return Work(_llama_kernels(shape, length, target), shape.num_layers * length**2)


def llama_decoded(shape: LlamaConfig, source: int, new_tokens: int, beams: int) -> Work:
    """An answer of `new_tokens` to `source` tokens, with a cache of the final length."""
    steps = (new_tokens - 1) * beams
    pairs = source**2 + steps * (source + new_tokens)
    return Work(_llama_kernels(shape, source + steps, 1 + steps), shape.num_layers * pairs)


def _llama_kernels(shape: LlamaConfig, positions: int, logits: int) -> tuple[tuple[str, int], ...]:
    return (("decoder/layers/.*/kernel", positions), _head(shape, logits))


def t5_teacher_forced(shape: T5Config, source: int, target: int) -> Work:
    """A row of `source` and `target` tokens."""
    pairs = shape.num_encoder_layers * source**2 + shape.num_decoder_layers * target * (target + source)
    return Work(_t5_kernels(shape, source, target), pairs)


def t5_decoded(shape: T5Config, source: int, new_tokens: int, beams: int) -> Work:
    """An answer of `new_tokens` to `source` tokens, with a cache of the final length."""
    written = 1 + (new_tokens - 1) * beams
    pairs = shape.num_encoder_layers * source**2 + shape.num_decoder_layers * written * (new_tokens + 1 + source)
    return Work(_t5_kernels(shape, source, written), pairs)


def _t5_kernels(shape: T5Config, read: int, written: int) -> tuple[tuple[str, int], ...]:
    return (
        ("encoder/layers/.*/kernel", read),
        ("decoder/layers/encoder_decoder_attention/(key|value)/kernel", read),
        ("decoder/layers/.*/kernel", written),
        _head(shape, written),
    )


def _head(shape: LlamaConfig | T5Config, logits: int) -> tuple[str, int]:
    return "token_embedder/embedding" if shape.tie_embeddings else "decoder/logits_dense/kernel", logits
