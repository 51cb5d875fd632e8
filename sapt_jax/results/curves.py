"""The training curves of a run.

    DIR/metrics.jsonl                    one object a line: kind, task_index, task, step and numbers
    DIR/tensorboard/{i:02d}-{task}/      the same curves as TensorBoard events, one sub-run for each task

Task numbers are task_index, counted from 0. Only process 0 of a run on several hosts writes.
JSON has no NaN: it is written as null. In an object store there are no TensorBoard events: their files grow.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sapt_jax.storage.paths import as_path, is_remote
from sapt_jax.storage.task_folders import numbered_folders
from sapt_jax.storage.text_files import read_json_lines, to_jsonable, write_text_atomically

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


# What a record says beside its numbers.
_PLACE = ("kind", "task_index", "task", "step")
_FIGURES = ".figures"


class RunLog:
    """The training curves of a run: DIR/metrics.jsonl and TensorBoard events. A context manager.

    Args:
        workdir: DIR.
        stand: of each task of the run, in order, its name and the last step whose records stay: what was logged past
            it by a run that was killed is dropped. None starts the curves anew.
    """

    def __init__(self, workdir: str | Path, *, stand: Sequence[tuple[str, float]] | None):
        self._is_writer = jax.process_index() == 0
        # An object store cannot append: there the file is written anew at every `flush`.
        self._lines: list[str] | None = [] if is_remote(workdir) else None
        self._file = as_path(workdir) / "metrics.jsonl"
        self._events = as_path(workdir) / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}
        self._logged: set[tuple[int, int, str]] = set()
        if not self._is_writer:
            return
        stand = stand or ()
        kept = _records_until(self._file, [last for _, last in stand]) if stand else []
        self._logged = {_key(record) for record in kept}
        lines = [json.dumps(record) + "\n" for record in kept]
        write_text_atomically(self._file, "".join(lines))
        if self._lines is None:
            self._mend_events(kept, stand)
            self._out = self._file.open("a", encoding="utf-8")
        else:
            self._lines += lines
            logging.getLogger(__name__).warning("%s: no TensorBoard events in an object store.", workdir)

    def log(self, kind: str, *, task_index: int, task: str, step: int, **numbers: Any) -> bool:
        """Appends one record, and says whether it is new.

        Args:
            kind: what was measured, such as "train", "dev" or "scores"; the prefix of its TensorBoard tags.
            step: optimizer steps of this task so far. A record of the same (task_index, step, kind) as one that is
                already there is left out, so work that a resumed run repeats is not logged twice.
            numbers: values to log; arrays of rank 1 become one TensorBoard curve for each entry.
        """
        record = {"kind": kind, "task_index": task_index, "task": task, "step": step, **to_jsonable(numbers)}
        if not self._is_writer or _key(record) in self._logged:
            return False
        self._logged.add(_key(record))
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._lines is not None:
            self._lines.append(line)
            return True
        self._out.write(line)
        self._out.flush()
        self._add_events(record)
        return True

    def show(self, task_index: int, task: str, images: Iterable[tuple[str, np.ndarray]]) -> None:
        """Puts images [H, W, 3] uint8 beside a task's curves, as figures/NAME; where none are kept, none are made."""
        if self._is_writer and self._lines is None:
            from tensorboardX import SummaryWriter

            # In a file of their own: curves are written anew from their lines, figures could not be.
            folder = self._events / f"{task_index:02d}-{task}"
            with SummaryWriter(str(folder), filename_suffix=_FIGURES) as writer:
                for name, pixels in images:
                    writer.add_image(f"figures/{name}", pixels, 0, dataformats="HWC")

    def flush(self) -> None:
        """Brings what was logged into the files; before a checkpoint, so that a resumed run finds its curves."""
        if self._is_writer and self._lines is not None:
            write_text_atomically(self._file, "".join(self._lines))
        for writer in self._writers.values():
            writer.flush()

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

    def _add_events(self, record: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if name not in _PLACE}
        writer = self._writer(f"{record['task_index']:02d}-{record['task']}")
        for tag, value in _curves(record["kind"], numbers):
            writer.add_scalar(tag, value, record["step"])

    def _writer(self, name: str) -> "SummaryWriter":
        # Imported on use: it brings PyTorch where that is installed, which takes seconds.
        from tensorboardX import SummaryWriter

        if name not in self._writers:
            for writer in self._writers.values():
                writer.close()
            self._writers = {name: SummaryWriter(str(self._events / name))}
        return self._writers[name]

    def _mend_events(self, kept: Sequence[Mapping[str, Any]], stand: Sequence[tuple[str, float]]) -> None:
        """Writes the events anew of tasks that a killed run may have left without some, or with too many.

        These are the last task that was logged, whose writer was still open, those after it, and what is not finished.
        """
        last = max((record["task_index"] for record in kept), default=-1)
        whole = {index for index, (_, step) in enumerate(stand) if index < last and step == math.inf}
        names = [name for name, _ in stand]
        for index, name, folder in numbered_folders(self._events):
            if index not in whole and (not names or names[index : index + 1] == [name]):
                for file in folder.iterdir():
                    if file.name.startswith("events.") and not file.name.endswith(_FIGURES):
                        file.unlink()
        for record in kept:
            if record["task_index"] not in whole:
                self._add_events(record)


def _key(record: Mapping[str, Any]) -> tuple[int, int, str]:
    return record["task_index"], record["step"], record["kind"]


def _records_until(path: Path, last: Sequence[float]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    remedy = "Delete the line, or what is no file, and run again."
    records = read_json_lines(path, remedy)
    for number, record in enumerate(records, start=1):
        if not all(type(record.get(name)) is int for name in ("task_index", "step")) or "kind" not in record:
            raise ValueError(f"{path}, line {number} is not a record of this log. {remedy}")
    return [record for record in records if _stays(record, last)]


def _stays(record: Mapping[str, Any], last: Sequence[float]) -> bool:
    return 0 <= record["task_index"] < len(last) and record["step"] <= last[record["task_index"]]


def _curves(kind: str, numbers: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in numbers.items():
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, entry in entries:
            if isinstance(entry, int | float):
                yield f"{kind}/{name}" if index is None else f"{kind}/{name}/{index:02d}", entry
