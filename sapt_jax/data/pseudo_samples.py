"""Pseudo-samples: inputs that stand for an earlier task in the reflection loss, and with answers in replay.

Layout of files: `{pseudo_dir}/{SuperNI|Long_Sequence}/{task}/train.json`, the CL_Benchmark format with one
generated "Definition" for the whole pool; "output" is mostly empty.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from sapt_jax.data.encoding import EncodedSplit, Ragged, encode_split
from sapt_jax.data.prompts import EncodingRules, Tokenizer
from sapt_jax.data.sources.task_files import definition_of, instances_of, task_rng
from sapt_jax.data.task import Instance, Task, read_json

PSEUDO_SOURCES = ("generate", "statistics", "files", "train", "none")
WITH_ANSWERS = (
    'Set config.pseudo_samples.source="train" for real rows, or "generate" with '
    "config.pseudo_samples.writer.answers=True for written ones."
)


@dataclasses.dataclass(frozen=True)
class PseudoSamples:
    """The pool of one task, with the definition its prompts carry (a generated one, when the pool was generated)."""

    definition: str
    instances: tuple[Instance, ...]


def find_pseudo_dir(pseudo_dir: str, data_dir: Path) -> Path:
    """Returns the pool folder: `pseudo_dir` itself, or `{data_dir}/generated_data/{pseudo_dir}`."""
    candidates = [Path(pseudo_dir).expanduser(), data_dir / "generated_data" / pseudo_dir]
    for folder in candidates:
        if pseudo_dir and folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no folder of pseudo-samples {pseudo_dir!r}: looked for {' and '.join(map(str, candidates))}. Set "
        f'config.pseudo_samples.dir, or config.pseudo_samples.source="train" to take a few training inputs instead.'
    )


def read_pseudo_samples(folder: Path, task_name: str, may_be_empty: bool = False) -> PseudoSamples:
    """Reads `{folder}/{task_name}/train.json`; rows with no output are what is expected here."""
    file = folder / task_name / "train.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: there are no pseudo-samples of {task_name}. Put them there, or set "
            'config.pseudo_samples.source="train".'
        )
    data = read_json(file)
    instances = instances_of(data, file, prefix=f"{task_name}-pseudo", on_bad_instance="keep", problems=[])
    if not instances and not may_be_empty:
        raise ValueError(f'{file}: holds no instances. Fill it, or set config.pseudo_samples.source="train".')
    return PseudoSamples(definition_of(data, file), instances)


def check_answers(samples: PseudoSamples, file: Path) -> None:
    """Raises ValueError naming the first sample of a file that has no answer."""
    for instance in samples.instances:
        if not instance.outputs[0].strip():
            raise ValueError(
                f"{file}: {instance.id} has no answer, and the method trains on those of earlier tasks. {WITH_ANSWERS}"
            )


def check_pairs(options: Any) -> None:
    """Checks that samples will have answers, for a method that trains on them, before any is read.

    Args:
      options: those of config.pseudo_samples.

    Raises:
      ValueError: there are no samples, or they will be written without answers.
    """
    wrong = {
        "none": "there are no rows of earlier tasks to train on",
        "generate": "the model writes samples without answers" if not options.writer.answers else "",
    }
    if reason := wrong.get(options.source):
        raise ValueError(f'config.pseudo_samples.source="{options.source}": {reason}. {WITH_ANSWERS}')


def pool_size(rows: int, share: float, minimum: int) -> int:
    """Pseudo-samples of a task with `rows` training rows: round-down(share * rows), but at least `minimum` (or all)."""
    return min(rows, max(minimum, math.floor(share * rows)))


def sample_train_inputs(task: Task, *, share: float, minimum: int, seed: int) -> PseudoSamples:
    """Takes `pool_size` training instances of the task, seeded."""
    size = pool_size(len(task.train), share, minimum)
    chosen = np.sort(task_rng(seed, task.name, "pseudo").choice(len(task.train), size, replace=False))
    return PseudoSamples(task.definition, tuple(task.train[i] for i in chosen))


@dataclasses.dataclass(frozen=True)
class PoolOrigin:
    """Where the pools of a run come from.

    Attributes:
      source: one of `PSEUDO_SOURCES`.
      folder: `{pseudo_dir}/{benchmark folder}`, which the source "files" reads; else None.
      share, minimum, seed: of the source "train", which takes real training inputs, see `sample_train_inputs`.
      with_answers: see `encode_pseudo_samples`.
      needs_answers: samples without answers are refused.
    """

    source: str
    folder: Path | None
    share: float
    minimum: int
    seed: int
    with_answers: bool = False
    needs_answers: bool = False

    def __post_init__(self):
        if self.source not in PSEUDO_SOURCES:
            raise ValueError(f"config.pseudo_samples.source must be one of {PSEUDO_SOURCES}, not {self.source!r}.")
        if self.source == "files" and self.folder is None:
            raise ValueError('config.pseudo_samples.source="files" needs a folder: set config.pseudo_samples.dir.')


def load_pseudo_samples(task: Task, origin: PoolOrigin) -> PseudoSamples | None:
    """The task's pool, or None for the sources "none", "statistics" and "generate" (written only after the task)."""
    if origin.source == "files":
        samples = read_pseudo_samples(origin.folder, task.name)
        if origin.needs_answers:
            check_answers(samples, origin.folder / task.name / "train.json")
        return samples
    if origin.source == "train":
        return sample_train_inputs(task, share=origin.share, minimum=origin.minimum, seed=origin.seed)
    return None


def encode_pseudo_samples(
    samples: PseudoSamples, *, template: str, tokenizer: Tokenizer, rules: EncodingRules, with_answers: bool = False
) -> EncodedSplit:
    """Tokenises a pool with the same template and rules as real data. The reflection loss reads `.sources` alone.

    Args:
      with_answers: each source goes on with its answer, "" where it has none, and the end token.
    """
    first_answer = dataclasses.replace(rules, references="first", on_long_target="cut")
    split = encode_split(
        samples.instances, definition=samples.definition, template=template, tokenizer=tokenizer, rules=first_answer
    )
    if not with_answers:
        return split
    rows = [np.concatenate([split.sources[row], split.targets[row]]) for row in range(len(split))]
    return dataclasses.replace(split, sources=Ragged.from_rows(rows))
