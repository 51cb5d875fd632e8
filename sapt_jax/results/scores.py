"""DIR/scores.json: score matrix, metrics, task order, seeds, protocol and config of a run.

Only process 0 of a run on several hosts writes. JSON has no NaN: it is written as null.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sapt_jax.storage.paths import as_path
from sapt_jax.storage.text_files import read_json, to_jsonable, write_text_atomically

SCORES_FORMAT = 1
_REMEDY = "Run the same command again, which writes it anew."


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a run tells after every task.

    Attributes:
      method: name of the continual-learning method.
      task_order: [T] task names, in the order they are trained.
      metric_per_task: task -> "rouge_l" | "exact_match".
      matrix: [T, T] scores, NaN where there is none (yet).
      summary: from metrics.summarise, over the tasks finished so far.
      seeds: by the name of the setting.
      protocol: every setting that a score depends on beside the model, such as dev_is_test or references.
      config: the run's config, a ConfigDict or a mapping.
      extra: more fields, such as single_task_scores or reflection_targets.
    """

    method: str
    task_order: Sequence[str]
    metric_per_task: Mapping[str, str]
    matrix: np.ndarray
    summary: Mapping[str, float | None]
    seeds: Mapping[str, int]
    protocol: Mapping[str, Any]
    config: Any
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """What scores.json holds."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        # The longest comes last.
        config = fields.pop("config")
        return {"format": SCORES_FORMAT, **fields, **self.extra, "config": config}


_FIELDS = tuple(field.name for field in dataclasses.fields(Scores) if field.name != "extra")


def write_scores(workdir: str | Path, scores: Scores) -> epath.Path:
    """Writes DIR/scores.json atomically and returns its path. Call it after every task."""
    path = as_path(workdir) / "scores.json"
    if jax.process_index() == 0:
        write_text_atomically(path, json.dumps(to_jsonable(scores.told()), indent=1, allow_nan=False) + "\n")
    return path


def _fault(scores: Mapping[str, Any]) -> str | None:
    """What of the fields of a scores.json is not as `Scores` has it."""
    kinds = {"method": str, "task_order": list, "metric_per_task": dict, "matrix": list, "summary": dict}
    for name, kind in (kinds | {"seeds": dict, "protocol": dict, "config": dict}).items():
        if not isinstance(scores[name], kind):
            return f"its {name} is a {type(scores[name]).__name__}, not a {kind.__name__}"
    order = scores["task_order"]
    if not order or not all(isinstance(name, str) and name in scores["metric_per_task"] for name in order):
        return "its task_order is not of tasks in metric_per_task"
    if [len(row) if isinstance(row, list) else -1 for row in scores["matrix"]] != [len(order)] * len(order):
        return f"its matrix is not {len(order)} rows of {len(order)}, as many as task_order has tasks"
    numbers = [*scores["summary"].values(), *(score for row in scores["matrix"] for score in row)]
    if not all(score is None or (type(score) in (int, float) and math.isfinite(score)) for score in numbers):
        return "a score is no finite number"
    return None


def read_scores(workdir: str | Path) -> dict[str, Any]:
    """Reads DIR/scores.json; "matrix" becomes a [T, T] float64 array with NaN for null.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    path = as_path(workdir) / "scores.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the --workdir of a run that has finished a task")
    scores = read_json(path, _REMEDY)
    missing = [field for field in ("format", *_FIELDS) if field not in scores]
    if missing:
        raise ValueError(f"{path}: not the scores of a run (without {', '.join(missing)})")
    if scores["format"] != SCORES_FORMAT:
        raise ValueError(
            f"{path}: written in format {scores['format']}, this version reads {SCORES_FORMAT}; run it again"
        )
    if fault := _fault(scores):
        raise ValueError(f"{path}: {fault}. {_REMEDY}")
    scores["matrix"] = np.array(scores["matrix"], dtype=np.float64)
    return scores
