"""How an answer is looked for, and what it says."""

import dataclasses
import math
from typing import Any

import numpy as np

from sapt_jax.pretrained.tokenizer import Tokenizer

# Logits over what is below are no float32 any more.
_TEMPERATURES = (0.001, 1000)


@dataclasses.dataclass(frozen=True)
class Search:
    """How an answer is looked for.

    Attributes:
      max_new_tokens: the most tokens of an answer.
      beams: 1 is greedy, more is beam search.
      temperature: 0 takes the most likely tokens; from 0.001 to 1000 they are drawn from softmax(logits / temperature).
      top_p: of drawing: only tokens take part before which less than this probability lies.
      seed: of drawing. The same seed draws the same answer, whatever is asked beside it.

    Raises:
      ValueError: naming the one that is out of its range.
    """

    max_new_tokens: int
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        whole = {"max_new_tokens": (1, 2**20), "beams": (1, 2**10), "seed": (0, 2**32 - 1)}
        for name, (least, most) in whole.items():
            value = getattr(self, name)
            if not _is_number(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, not {value!r}")
        low, high = _TEMPERATURES
        if not _is_number(self.temperature, float) or not (self.temperature == 0 or low <= self.temperature <= high):
            raise ValueError(f"temperature must be 0, or a number from {low} to {high}, not {self.temperature!r:.60}")
        if not _is_number(self.top_p, float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a number above 0 and at most 1, not {self.top_p!r:.60}")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError(f"beams={self.beams} and temperature={self.temperature}: beams are not drawn; set one")


def _is_number(value: Any, kind: type) -> bool:
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < math.inf


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to one input.

    Attributes:
      text: without the end token, stripped.
      attention: the weight of every task's block in it, by the task's name; {} where tasks share blocks.
      prompt_tokens: of the input in its template.
      new_tokens: of the answer, without its end token.
      finished: it ended by itself; else max_new_tokens cut it off.
      cut: the input was longer than the run's config.data.max_source_length, and lost its middle.
    """

    text: str
    attention: dict[str, float]
    prompt_tokens: int
    new_tokens: int
    finished: bool
    cut: bool


def read_answer(tokens: np.ndarray, limit: int, tokenizer: Tokenizer) -> tuple[str, int, bool]:
    """(text, tokens in it, whether it ended by itself) of the ids [N] that a search gave, of which `limit` count."""
    tokens = tokens[:limit]
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    length = int(ends[0]) if ends.size else len(tokens)
    return tokenizer.decode(tokens[:length]).strip(), length, bool(ends.size)
