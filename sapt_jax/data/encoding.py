"""Tokenises a split once, into ragged arrays."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from sapt_jax.data.prompts import (
    EncodingRules,
    Prompt,
    Tokenizer,
    choose_reference,
    encode_answer,
    encode_chat,
    encode_prompt,
    make_prompt,
    write_sample,
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
    """A split's prompts and answers as token ids, row for row, with how many of each were cut to the limits.

    `writing` has, for a method that learns to write rows, the cue and the text of each row in their places.
    """

    sources: Ragged
    targets: Ragged
    truncated_sources: int
    truncated_targets: int
    writing: "EncodedSplit | None" = None

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> np.ndarray:
        """[n, 2] int64: source and target length of every row."""
        return np.stack([self.sources.lengths, self.targets.lengths], axis=1)

    def take(self, rows: np.ndarray) -> "EncodedSplit":
        """The rows of these numbers, in this order. What was cut stays counted over the whole split."""
        sources, targets = (Ragged.from_rows([of[i] for i in rows]) for of in (self.sources, self.targets))
        writing = self.writing and self.writing.take(rows)
        return dataclasses.replace(self, sources=sources, targets=targets, writing=writing)


def join(splits: Sequence[EncodedSplit]) -> EncodedSplit:
    """The rows of several splits, one split after the other."""
    if len(splits) == 1:
        return splits[0]
    texts = [split.writing for split in splits if split.writing is not None]
    return EncodedSplit(
        _join([split.sources for split in splits]),
        _join([split.targets for split in splits]),
        sum(split.truncated_sources for split in splits),
        sum(split.truncated_targets for split in splits),
        join(texts) if len(texts) == len(splits) else None,
    )


def _join(parts: Sequence[Ragged]) -> Ragged:
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.ids for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))


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
    writing = encode_texts(instances, definition, tokenizer, rules) if rules.writing else None
    return EncodedSplit(Ragged.from_rows(sources), Ragged.from_rows(targets), cut_sources, cut_targets, writing)


def encode_texts(
    instances: Sequence[Instance], definition: str, tokenizer: Tokenizer, rules: EncodingRules
) -> EncodedSplit:
    """What a writer learns of instances by `rules.writing`: the cue as source, each instance's text as target.

    A text over the limit is cut and then has no end, so that the writer does not learn to end early.
    """
    writing = rules.writing
    if writing is None:
        raise ValueError("rules without writing have no texts")
    rules = dataclasses.replace(
        rules,
        max_target_length=writing.max_length,
        target_keeps_end=False,
        on_long_target="cut",
    )
    texts = [
        encode_answer(write_sample(definition, instance, writing.answers), tokenizer, rules) for instance in instances
    ]
    cue, _ = encode_prompt(Prompt("", writing.cue, ""), tokenizer, rules)
    sources = Ragged.from_rows([cue] * len(texts))
    return EncodedSplit(sources, Ragged.from_rows([ids for ids, _ in texts]), 0, sum(cut for _, cut in texts))
