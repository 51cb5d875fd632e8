"""The answers of a run, with their attention weights, one JSON object a line.

    DIR/predictions/{i:02d}-{task}/{j:02d}-{task}.jsonl    answers on task j after training task i, counted from 0

Only process 0 of a run on several hosts writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from sapt_jax.data.task import Instance
from sapt_jax.storage.paths import as_path
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically


def predictions_file(workdir: str | Path, task_order: Sequence[str], task_index: int, tested_index: int) -> epath.Path:
    """Where the answers on task tested_index after training task task_index lie."""
    trained, tested = task_order[task_index], task_order[tested_index]
    return as_path(workdir) / "predictions" / f"{task_index:02d}-{trained}" / f"{tested_index:02d}-{tested}.jsonl"


def write_predictions(
    workdir: str | Path,
    *,
    task_order: Sequence[str],
    task_index: int,
    tested_index: int,
    instances: Sequence[Instance],
    predictions: Sequence[str],
    scores: Sequence[float],
    attention_weights: np.ndarray | None,
) -> epath.Path:
    """Writes one line for each instance, in order, atomically, and returns the file.

    Args:
        scores: [N], 0 to 100 (metrics.score_instances).
        attention_weights: [N, T] mixture weights of each request over the task slots, or None for methods without.
    """
    path = predictions_file(workdir, task_order, task_index, tested_index)
    weights = [None] * len(instances) if attention_weights is None else np.asarray(attention_weights, np.float64)
    lines = [
        json.dumps(
            to_jsonable(
                {
                    "id": instance.id,
                    "input": instance.input,
                    "prediction": prediction,
                    "references": instance.outputs,
                    "score": float(score),
                    "attention_weights": None if row is None else np.round(row, 6),
                }
            ),
            ensure_ascii=False,
            allow_nan=False,
        )
        for instance, prediction, score, row in zip(instances, predictions, scores, weights, strict=True)
    ]
    if jax.process_index() == 0:
        write_text_atomically(path, "".join(line + "\n" for line in lines))
    return path


def read_predictions_scores(file: Path | epath.Path) -> list[float]:
    """The score of each instance, 0 to 100, in the order of the file.

    Raises ValueError naming the file and the line that is not an answer with its score.
    """
    scores = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            scores.append(float(json.loads(line)["score"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}, line {number}: not an answer with its score; delete the file and run again"
            ) from None
    return scores
