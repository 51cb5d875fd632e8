"""The answers of a run, with their attention weights, one JSON object a line.

    DIR/predictions/{i:02d}-{task}/{j:02d}-{task}.jsonl    answers on task j after training task i, counted from 0

Only process 0 of a run on several hosts writes.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sapt_jax.data.task import Instance
from sapt_jax.storage.names import check_name
from sapt_jax.storage.paths import as_path
from sapt_jax.storage.text_files import read_json_lines, to_jsonable, write_text_atomically

_ANEW = "and the same command has the task answered anew."


def predictions_file(workdir: str | Path, task_order: Sequence[str], task_index: int, tested_index: int) -> epath.Path:
    """Where the answers on task tested_index after training task task_index lie."""
    trained, tested = (check_name(task_order[index], "task") for index in (task_index, tested_index))
    return as_path(workdir) / "predictions" / f"{task_index:02d}-{trained}" / f"{tested_index:02d}-{tested}.jsonl"


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a run answered to the inputs of a split.

    Attributes:
      instances: [N] what was asked.
      texts: [N] the answers.
      scores: [N] of each, 0 to 100 (`metrics.score_instances`).
      attention_weights: [N, T] mixture weights of each input over the task slots, or None for methods without.
    """

    instances: Sequence[Instance]
    texts: Sequence[str]
    scores: Sequence[float]
    attention_weights: np.ndarray | None


def round_weights(weights: np.ndarray) -> np.ndarray:
    """Weights as a file has them, in float64."""
    return np.round(np.asarray(weights, np.float64), 6)


def write_predictions(file: epath.Path, answers: Answers) -> None:
    """Writes one line for each instance, in order, atomically, into a file of `predictions_file`."""
    instances, weights = answers.instances, answers.attention_weights
    rows = [None] * len(instances) if weights is None else round_weights(weights)
    lines = [
        json.dumps(
            to_jsonable(
                {
                    "id": instance.id,
                    "input": instance.input,
                    "prediction": text,
                    "references": instance.outputs,
                    "score": float(score),
                    "attention_weights": row,
                }
            ),
            ensure_ascii=False,
            allow_nan=False,
        )
        for instance, text, score, row in zip(instances, answers.texts, answers.scores, rows, strict=True)
    ]
    if jax.process_index() == 0:
        write_text_atomically(file, "".join(line + "\n" for line in lines))


def read_predictions(file: Path | epath.Path, instances: Sequence[Instance]) -> tuple[np.ndarray, np.ndarray | None]:
    """The scores [N] of stored answers, 0 to 100, and their mixture weights [N, T] or None, in the file's order.

    Args:
      instances: [N] the test set of today.

    Raises:
      ValueError: the file is broken, or its answers are not to these instances; names the first row.
    """
    rows = read_json_lines(file, f"Delete the file, {_ANEW}")
    for number, row in enumerate(rows, start=1):
        if not _is_answer(row, rows[0]):
            raise ValueError(f"{file}, line {number} is not an answer with its score. Delete the file, {_ANEW}")
    asked = [(instance.input, list(instance.outputs)) for instance in instances]
    stored = [(row.get("input"), row.get("references")) for row in rows]
    if len(stored) < len(asked) and stored == asked[: len(stored)]:
        raise ValueError(f"{file} was cut short: it has {len(stored)} of {len(asked)} rows. Delete the file, {_ANEW}")
    if stored != asked:
        pairs = itertools.zip_longest(stored, asked)
        first = next(number for number, (before, now) in enumerate(pairs, start=1) if before != now)
        raise ValueError(
            f"{file}: the rows of the test set have changed since these earlier answers, from row {first} on, and "
            "scores on both would not compare. Put the earlier rows back, or delete "
            f"{file.parent.parent / '*' / file.name}, {_ANEW}"
        )
    weights = [row.get("attention_weights") for row in rows]
    scores = np.array([row["score"] for row in rows], np.float64)
    return scores, None if None in weights else np.array(weights, np.float64)


def _is_answer(row: dict[str, Any], first: dict[str, Any]) -> bool:
    score, weights, of_first = row.get("score"), row.get("attention_weights"), first.get("attention_weights")
    if type(score) not in (int, float) or not 0 <= score <= 100 or not isinstance(row.get("prediction"), str):
        return False
    if weights is None or of_first is None:
        return weights is of_first
    if not isinstance(weights, list) or not isinstance(of_first, list) or len(weights) != len(of_first):
        return False
    return all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights)
