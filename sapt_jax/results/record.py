"""What a run left in its workdir, read as far as it goes: a run that still trains, or lost a file, is read too."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from sapt_jax.data.benchmarks import resolve_task_order
from sapt_jax.results import metrics
from sapt_jax.results.predictions import predictions_file
from sapt_jax.results.scores import read_scores
from sapt_jax.storage.paths import as_path

# Any of these makes a folder a workdir.
MARKS = ("scores.json", "config.json", "metrics.jsonl")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """What a run left.

    Attributes:
      workdir: where it lies.
      name: what it is called beside others.
      tasks: [T] names, in the order of training.
      config: its settings by dotted name, as the run wrote them; may be empty.
      scores: what scores.json holds; empty where there is none that can be read.
      curves: the records of metrics.jsonl, in order.
      matrix: [T, T] scores, NaN where there is none.
      gaps: a sentence for everything that is missing or broken.
    """

    workdir: epath.Path
    name: str
    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    scores: Mapping[str, Any]
    curves: Sequence[Mapping[str, Any]]
    matrix: np.ndarray
    gaps: tuple[str, ...]

    @property
    def method(self) -> str:
        return str(self.scores.get("method") or self.config.get("method") or "unknown method")

    @property
    def finished(self) -> int:
        """Tasks that are learned and tested."""
        return len(metrics.finished_part(self.matrix))

    @property
    def labels(self) -> Mapping[str, Any]:
        """What is told with the scores: what the method was told, saw of old data and keeps; empty in older runs."""
        found = self.scores.get("labels")
        return found if isinstance(found, Mapping) else {}

    @property
    def seconds(self) -> np.ndarray:
        """[T] seconds of each task, NaN where they are not known."""
        return np.array([number(cost.get("seconds")) for cost in self._costs()])

    @property
    def peak_bytes(self) -> float:
        """The most memory that any task took, NaN where it is not known."""
        found = [number(cost.get("peak_bytes")) for cost in self._costs()]
        return max((size for size in found if not math.isnan(size)), default=math.nan)

    def _costs(self) -> list[Mapping[str, Any]]:
        found = self.scores.get("costs")
        by_name = found if isinstance(found, Mapping) else {}
        return [by_name.get(name) or {} for name in self.tasks]

    @property
    def tested(self) -> tuple[str, ...]:
        """Every task that is tested: those of the order, then those never trained on."""
        unseen = self.scores.get("unseen")
        return (*self.tasks, *(unseen if isinstance(unseen, Mapping) else ()))

    def logged(self, kind: str, task_index: int) -> list[Mapping[str, Any]]:
        """The records of one kind and task, by step."""
        found = [row for row in self.curves if row["kind"] == kind and row["task_index"] == task_index]
        return sorted(found, key=lambda row: row["step"])

    def answers(self, task_index: int, tested: int) -> list[dict[str, Any]]:
        """The rows of a predictions file; none where it is missing, and without those that are broken."""
        file = predictions_file(self.workdir, self.tested, task_index, tested)
        return [row for row in _json_lines(file) if row is not None and "prediction" in row]

    def weights(self, task_index: int, tested: int) -> np.ndarray | None:
        """Mixture weights [N, S] of the answers on a task after training another, or None."""
        rows = [row.get("attention_weights") for row in self.answers(task_index, tested)]
        rows = [row for row in rows if isinstance(row, list) and row]
        widest = max(map(len, rows), default=0)
        return np.array([padded(row, widest) for row in rows]) if rows else None

    def samples(self) -> dict[int, Mapping[str, Any]]:
        """By task index: how the samples that the model wrote compare with real inputs."""
        found = {}
        for index, name in enumerate(self.tasks):
            folder = self.workdir / "tasks" / f"{index:02d}-{name}" / "generated_data"
            # Below the benchmark's own folder, where it has one.
            for pattern in ("*/quality.json", "*/*/quality.json") if folder.is_dir() else ():
                for file in folder.glob(pattern):
                    if isinstance(read := _json(file), dict):
                        found[index] = read
        return found


def read_record(workdir: str | Path, name: str = "") -> Record:
    """Reads what there is.

    Args:
      name: what to call the run; by default its folder's name.

    Raises:
      FileNotFoundError: the folder holds no run.
    """
    workdir = as_path(workdir)
    if not is_workdir(workdir):
        raise FileNotFoundError(f"{workdir}: no run lies here (none of {', '.join(MARKS)}); give the --workdir of one.")
    gaps: list[str] = []
    scores: Mapping[str, Any] = {}
    try:
        scores = read_scores(workdir)
    except FileNotFoundError:
        gaps.append("No task is finished: scores.json is not there.")
    except (ValueError, TypeError, AttributeError) as error:
        gaps.append(f"scores.json cannot be read: {error}")
    config = _json(workdir / "config.json")
    if not isinstance(config, dict):
        gaps.append("config.json is missing or broken: what was run is told only as far as scores.json does.")
        config = {}
    rows = list(_json_lines(workdir / "metrics.jsonl"))
    curves = [row for row in rows if row is not None and {"kind", "task_index", "task", "step"} <= row.keys()]
    if not rows:
        gaps.append("There are no curves: metrics.jsonl is missing or empty.")
    elif len(curves) < len(rows):
        gaps.append(f"{len(rows) - len(curves)} lines of metrics.jsonl cannot be read, and are left out.")
    tasks = _task_names(scores, config, curves)
    matrix = scores["matrix"] if scores else metrics.empty_matrix(len(tasks))
    finished = len(metrics.finished_part(matrix))
    if scores and finished < len(tasks):
        gaps.append(f"The run is not at its end: {finished} of {len(tasks)} tasks are learned and tested.")
    return Record(workdir, name or workdir.resolve().name, tasks, config, scores, curves, matrix, tuple(gaps))


def is_workdir(folder: epath.Path) -> bool:
    """Whether a run lies in a folder."""
    return any((folder / mark).is_file() for mark in MARKS)


def padded(values: Sequence[Any], length: int) -> np.ndarray:
    """Numbers as float64 [length], NaN for null, for what is no number, and at the end."""
    found = [number(value) for value in values[:length]]
    return np.array(found + [math.nan] * (length - len(found)))


def number(value: Any) -> float:
    """A number of a JSON file; NaN for null and whatever else is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _task_names(
    scores: Mapping[str, Any], config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    if scores:
        return tuple(map(str, scores["task_order"]))
    try:
        return resolve_task_order(config["task_order"], config["benchmark"], own_dir=config.get("own_dir", ""))
    except (KeyError, ValueError, AttributeError):
        seen = {row["task_index"]: str(row["task"]) for row in curves}
        return tuple(seen[index] for index in sorted(seen))


def _json(file: epath.Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _json_lines(file: epath.Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a file, None for a line that is none. A line ends at "\\n" and nowhere else."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else None
