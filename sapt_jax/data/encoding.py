"""Tokenises a split once, into ragged arrays."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sapt_jax.data.prompts import (
    EncodingRules,
    Tokenizer,
    choose_reference,
    encode_answer,
    encode_chat,
    encode_prompt,
    make_prompt,
)
from sapt_jax.data.task import Instance


@dataclasses.dataclass(frozen=True)
class Ragged:
    """n rows of token ids: row i is `ids[offsets[i]:offsets[i + 1]]`. ids [total] int32, offsets [n + 1] int64."""

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int]]) -> "Ragged":
        rows = list(rows)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
        ids = np.fromiter((token for row in rows for token in row), np.int32, count=int(offsets[-1]))
        return cls(ids, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """A split's prompts and answers as token ids, row for row, with how many of each were cut to the limits."""

    sources: Ragged
    targets: Ragged
    truncated_sources: int
    truncated_targets: int

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> np.ndarray:
        """[n, 2] int64: source and target length of every row."""
        return np.stack([self.sources.lengths, self.targets.lengths], axis=1)

    def take(self, rows: np.ndarray) -> "EncodedSplit":
        """The rows of these numbers, in this order. What was cut stays counted over the whole split."""
        sources, targets = (Ragged.from_rows([of[i] for i in rows]) for of in (self.sources, self.targets))
        return dataclasses.replace(self, sources=sources, targets=targets)


def encode_split(
    instances: Sequence[Instance], *, definition: str, template: str, tokenizer: Tokenizer, rules: EncodingRules
) -> EncodedSplit:
    """Tokenises instances in order; row i of the result is `instances[i]`.

    A chat is written in the tokenizer's own template where it has one, any other input in `template`. Errors name the
    instance's file and row.
    """
    sources, targets = [], []
    cut_sources = cut_targets = 0
    for instance in instances:
        try:
            if instance.chat and tokenizer.has_chat_template:
                source, cut = encode_chat(definition, instance.chat, tokenizer, rules)
            else:
                source, cut = encode_prompt(make_prompt(template, definition, instance.input), tokenizer, rules)
            cut_sources += cut
            answer = choose_reference(instance, rules.references, rules.seed)
            target, cut = encode_answer(answer, tokenizer, rules)
            cut_targets += cut
        except ValueError as error:
            raise ValueError(f"{instance.place}: {error}") from error
        sources.append(source)
        targets.append(target)
    return EncodedSplit(Ragged.from_rows(sources), Ragged.from_rows(targets), cut_sources, cut_targets)
