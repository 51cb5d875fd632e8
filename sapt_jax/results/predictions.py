"""The answers of a run, with their attention weights, one JSON object a line.

    DIR/predictions/{i:02d}-{task}/{j:02d}-{task}.jsonl    answers on task j after training task i, counted from 0

Only process 0 of a run on several hosts writes.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from sapt_jax.data.task import Instance
from sapt_jax.storage.names import check_name
from sapt_jax.storage.paths import as_path
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically


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


def read_predictions(file: Path | epath.Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The scores [N] of the file's instances, 0 to 100, and their mixture weights [N, T] or None, in its order.

    Raises ValueError naming the file and the line that is not an answer with its score.
    """
    scores, weights = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            scores.append(float(row["score"]))
            weights.append(row.get("attention_weights"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}, line {number}: not an answer with its score; delete the file and run again"
            ) from None
    return np.array(scores), None if None in weights else np.array(weights, np.float64)
