"""Samples that a writer writes: what of a text is kept, and how it compares with the real inputs."""

import collections
import dataclasses
import json
import random
from collections.abc import Sequence

from etils import epath

from sapt_jax.data.prompts import ANSWER_MARK, INPUT_MARK
from sapt_jax.data.pseudo_samples import PseudoSamples
from sapt_jax.data.task import Instance, Task
from sapt_jax.storage.paths import as_path


@dataclasses.dataclass(frozen=True)
class Sample:
    """One written sample; `answer` is empty where none was asked for."""

    definition: str
    input: str
    answer: str


def read_sample(text: str, answers: bool) -> Sample | str:
    """The sample in a written text, up to a second input mark, or the reason why there is none."""
    definition, *rest = text.split(INPUT_MARK)
    if not rest:
        return "no input mark"
    if ANSWER_MARK in definition:
        return "answer before input"
    written, _, answer = rest[0].partition(ANSWER_MARK)
    if not written.strip():
        return "empty input"
    if answers and not answer.strip():
        return "no answer"
    return Sample(definition.strip(), written.strip(), answer.strip() if answers else "")


@dataclasses.dataclass
class Collection:
    """Distinct samples in the order they were written, and how many texts were rejected for each reason.

    Attributes:
      wanted: samples to collect; what comes after is left.
    """

    wanted: int
    samples: list[Sample] = dataclasses.field(default_factory=list)
    rejected: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def full(self) -> bool:
        return len(self.samples) >= self.wanted

    def add(self, sample: Sample | str) -> None:
        """Takes a sample, or the reason why a text is none."""
        if self.full:
            return
        if isinstance(sample, str):
            self.rejected[sample] += 1
        elif any(sample.input == other.input for other in self.samples):
            self.rejected["repeated"] += 1
        else:
            self.samples.append(sample)

    def pool(self, name: str) -> PseudoSamples:
        """The samples as a pool of task `name`, under the definition that was written most often."""
        counts = collections.Counter(sample.definition for sample in self.samples)
        instances = (
            Instance(f"{name}-written-{number}", sample.input, (sample.answer,))
            for number, sample in enumerate(self.samples)
        )
        return PseudoSamples(counts.most_common(1)[0][0] if counts else "", tuple(instances))


def describe_pool(pool: PseudoSamples, task: Task) -> dict[str, float]:
    """How a pool's inputs compare with the task's training inputs.

    Returns:
      copies: share of the inputs that are a training input word for word.
      definition_kept: 1 where the pool's definition is the task's.
      distinct_1, distinct_2: distinct words and pairs of words over all of them (arXiv 1510.03055), of the pool, and
        real_distinct_1, real_distinct_2 of as many training inputs.
      words, real_words: mean words of an input.
    """
    written = [instance.input for instance in pool.instances]
    real = [instance.input for instance in task.train]
    known = {_words(text) for text in real}
    # As many as were written: the share of distinct words falls with the number of texts.
    drawn = random.Random(0).sample(real, min(len(real), len(written)))
    return {
        "copies": _mean([_words(text) in known for text in written]),
        "definition_kept": float(_words(pool.definition) == _words(task.definition)),
        "distinct_1": distinct_share(written, 1),
        "distinct_2": distinct_share(written, 2),
        "real_distinct_1": distinct_share(drawn, 1),
        "real_distinct_2": distinct_share(drawn, 2),
        "words": _mean([len(_words(text)) for text in written]),
        "real_words": _mean([len(_words(text)) for text in real]),
    }


def distinct_share(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of the texts; 0 where there are none."""
    grams = [words[i : i + n] for words in map(_words, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def pool_json(pool: PseudoSamples) -> str:
    """A pool in the layout of generated_data, as `data.pseudo_samples.read_pseudo_samples` reads it."""
    data = {
        "Definition": [pool.definition],
        "Positive Examples": [],
        "Negative Examples": [],
        "Instances": [
            {"id": instance.id, "input": instance.input, "output": instance.outputs[0]} for instance in pool.instances
        ],
    }
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def pool_file(folder: str | epath.Path, benchmark_folder: str, name: str) -> epath.Path:
    """Where the pool of a task lies under its folder."""
    return as_path(folder) / "generated_data" / benchmark_folder / name / "train.json"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
