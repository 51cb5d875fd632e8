"""What a run leaves behind beside its checkpoints.

    DIR/metrics.jsonl                 one object a line: kind, task_index, task, step and numbers
    DIR/tensorboard/{i:02d}-{task}/   the same curves as TensorBoard events, one sub-run for each task
    DIR/scores.json                   score matrix, metrics, task order, seeds, protocol and config
    DIR/predictions/{i:02d}-{task}/{j:02d}-{task}.jsonl
                                      answers on task j after training task i, with their attention weights

Task numbers are task_index, counted from 0. Only process 0 of a run on several hosts writes.
JSON has no NaN: it is written as null. In an object store there are no TensorBoard events: their files grow.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from sapt_jax.data.task import Instance
from sapt_jax.storage.paths import as_path, is_remote

SCORES_FORMAT = 1
_SCORES_FIELDS = tuple("format method task_order metric_per_task matrix summary seeds protocol config".split())


def to_jsonable(value: Any) -> Any:
    """Plain JSON data: arrays become lists, mappings dicts, paths strings; NaN and infinities become None."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return to_jsonable(np.asarray(value).tolist())
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_jsonable(item) for item in items]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON")


def write_text_atomically(path: Path | epath.Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)


def write_scores(
    workdir: str | Path,
    *,
    method: str,
    task_order: Sequence[str],
    metric_per_task: Mapping[str, str],
    matrix: np.ndarray,
    summary: Mapping[str, float | None],
    seeds: Mapping[str, int],
    protocol: Mapping[str, Any],
    config: Any,
    **extra: Any,
) -> epath.Path:
    """Writes DIR/scores.json atomically and returns its path. Call it after every task.

    Args:
        method: name of the continual-learning method.
        task_order: [T] task names, in the order they are trained.
        metric_per_task: task -> "rouge_l" | "exact_match".
        matrix: [T, T] scores, NaN where there is none (yet).
        summary: from metrics.summarise, over the tasks finished so far.
        protocol: every setting that a score depends on beside the model, such as dev_is_test or references.
        config: the run's config, a ConfigDict or a mapping.
        extra: more fields, such as single_task_scores or reflection_targets.
    """
    path = as_path(workdir) / "scores.json"
    payload = {
        "format": SCORES_FORMAT,
        "method": method,
        "task_order": task_order,
        "metric_per_task": metric_per_task,
        "matrix": matrix,
        "summary": summary,
        "seeds": seeds,
        "protocol": protocol,
        **extra,
        "config": config,
    }
    if jax.process_index() == 0:
        write_text_atomically(path, json.dumps(to_jsonable(payload), indent=1, allow_nan=False) + "\n")
    return path


def read_scores(workdir: str | Path) -> dict[str, Any]:
    """Reads DIR/scores.json; "matrix" becomes a [T, T] float64 array with NaN for null.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    path = as_path(workdir) / "scores.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the --workdir of a run that has finished a task")
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}); run again to write it anew") from None
    missing = [field for field in _SCORES_FIELDS if not isinstance(scores, dict) or field not in scores]
    if missing:
        raise ValueError(f"{path}: not the scores of a run (without {', '.join(missing)})")
    if scores["format"] != SCORES_FORMAT:
        raise ValueError(
            f"{path}: written in format {scores['format']}, this version reads {SCORES_FORMAT}; run it again"
        )
    scores["matrix"] = np.array(scores["matrix"], dtype=np.float64)
    size = len(scores["task_order"])
    if scores["matrix"].shape != (size, size):
        raise ValueError(f"{path}: the matrix has shape {scores['matrix'].shape}, but task_order has {size} tasks")
    return scores


def read_single_task_scores(workdirs: Sequence[str], protocol: Mapping[str, Any]) -> dict[str, float]:
    """Task -> score of runs that learned one task each, what FWT compares with.

    Raises FileNotFoundError or ValueError: a folder without scores, a run of several tasks, or another protocol.
    """
    scores = {}
    for workdir in workdirs:
        run = read_scores(workdir)
        if len(run["task_order"]) != 1:
            raise ValueError(f"{workdir}: a run of {len(run['task_order'])} tasks; FWT needs runs of one task each")
        wanted = to_jsonable(protocol)
        differ = sorted(name for name in wanted if run["protocol"].get(name) != wanted[name])
        if differ:
            raise ValueError(f"{workdir}: scored with other settings of {', '.join(differ)}; run it with this run's")
        scores[run["task_order"][0]] = float(run["matrix"][0, 0])
    return scores


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


class RunLog:
    """The training curves of a run: DIR/metrics.jsonl and TensorBoard events. A context manager.

    Args:
        workdir: DIR.
        resume_from: None starts the curves anew; (task_index, step) goes on after that step, and everything logged
            past it by the run that was killed is dropped.
    """

    def __init__(self, workdir: str | Path, *, resume_from: tuple[int, int] | None):
        self._is_writer = jax.process_index() == 0
        # An object store cannot append: there the file is written anew at every `flush`.
        self._lines: list[str] | None = [] if is_remote(workdir) else None
        self._file = as_path(workdir) / "metrics.jsonl"
        self._events = as_path(workdir) / "tensorboard"
        self._resume_from = resume_from
        self._writers: dict[str, SummaryWriter] = {}
        self._logged: set[tuple[int, int, str]] = set()
        if not self._is_writer:
            return
        kept = [] if resume_from is None else _records_until(self._file, resume_from)
        self._logged = {_key(record) for record in kept}
        lines = [json.dumps(record) + "\n" for record in kept]
        write_text_atomically(self._file, "".join(lines))
        if self._lines is None:
            self._drop_events()
            self._out = self._file.open("a", encoding="utf-8")
        else:
            self._lines += lines
            logging.getLogger(__name__).warning("%s: no TensorBoard events in an object store.", workdir)

    def log(self, kind: str, *, task_index: int, task: str, step: int, **numbers: Any) -> None:
        """Appends one record.

        Args:
            kind: what was measured, such as "train", "dev" or "scores"; the prefix of its TensorBoard tags.
            step: optimizer steps of this task so far. A record of the same (task_index, step, kind) as one that is
                already there is left out, so work that a resumed run repeats is not logged twice.
            numbers: values to log; arrays of rank 1 become one TensorBoard curve for each entry.
        """
        record = {"kind": kind, "task_index": task_index, "task": task, "step": step, **to_jsonable(numbers)}
        if not self._is_writer or _key(record) in self._logged:
            return
        self._logged.add(_key(record))
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._lines is not None:
            self._lines.append(line)
            return
        self._out.write(line)
        self._out.flush()
        writer = self._writer(task_index, task)
        for tag, value in _curves(kind, {key: record[key] for key in numbers}):
            writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Brings what was logged into the file; before a checkpoint, so that a resumed run finds its curves."""
        if self._is_writer and self._lines is not None:
            write_text_atomically(self._file, "".join(self._lines))

    def close(self) -> None:
        self.flush()
        if self._is_writer and self._lines is None:
            self._out.close()
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _writer(self, task_index: int, task: str) -> SummaryWriter:
        name = f"{task_index:02d}-{task}"
        if name not in self._writers:
            for writer in self._writers.values():
                writer.close()
            purge_step = None
            if self._resume_from is not None and self._resume_from[0] == task_index:
                purge_step, self._resume_from = self._resume_from[1] + 1, None
            self._writers = {name: SummaryWriter(str(self._events / name), purge_step=purge_step)}
        return self._writers[name]

    def _drop_events(self) -> None:
        last_kept = -1 if self._resume_from is None else self._resume_from[0]
        for folder in self._events.glob("*-*"):
            if int(folder.name.split("-", 1)[0]) > last_kept:
                folder.rmtree()


def _key(record: Mapping[str, Any]) -> tuple[int, int, str]:
    return record["task_index"], record["step"], record["kind"]


def _records_until(path: Path, last: tuple[int, int]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # A run killed while it wrote leaves an unfinished last line; whole lines end in a newline.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            position = (record["task_index"], record["step"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: not a record of this log; delete the line and run again"
            ) from None
        if position <= last:
            records.append(record)
    return records


def _curves(kind: str, numbers: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in numbers.items():
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, entry in entries:
            if isinstance(entry, int | float):
                yield f"{kind}/{name}" if index is None else f"{kind}/{name}/{index:02d}", entry
