"""Stand-ins for the data tests: a tokenizer of words, and random tasks."""

import numpy as np

from sapt_jax.data.benchmarks import SplitRules
from sapt_jax.data.prompts import EncodingRules
from sapt_jax.data.task import Instance, Task


class WordTokenizer:
    """Every white space and every run of other characters is one token; ids are given out as words come."""

    pad_id, bos_id, eos_id, add_bos = 0, 1, 2, True
    has_chat_template = False

    def __init__(self):
        self.words = ["<pad>", "<s>", "</s>"]

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in self._split(text):
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return ids

    def decode(self, ids) -> str:
        return "".join(self.words[i] for i in ids if i > 2)

    @staticmethod
    def _split(text: str) -> list[str]:
        words, word = [], ""
        for character in text:
            if character.isspace():
                words += [word, character] if word else [character]
                word = ""
            else:
                word += character
        return words + [word] if word else words


def rules(**changes) -> EncodingRules:
    base = dict(
        family="decoder_only",
        add_bos=True,
        max_source_length=64,
        max_target_length=8,
        truncation="middle",
        target_keeps_end=True,
        references="first",
        seed=0,
        on_long_target="cut",
    )
    return EncodingRules(**{**base, **changes})


def cuts(**changes) -> SplitRules:
    base = dict(dev_size=0, dev_is_test=False, max_train=0, max_dev=0, max_test=0, seed=0, on_bad_instance="error")
    return SplitRules(**{**base, **changes})


def random_task(rng: np.random.Generator, name: str, sizes=(20, 5, 7), longest: int = 30) -> Task:
    def words(most):
        return " ".join(rng.choice(list("abcdefghij"), rng.integers(1, most + 1)))

    def split(kind, size):
        return tuple(Instance(f"{name}-{kind}-{i}", words(longest), (words(5),)) for i in range(size))

    return Task(
        name,
        "Say something .",
        *(split(kind, n) for kind, n in zip(("train", "dev", "test"), sizes, strict=True)),
    )
