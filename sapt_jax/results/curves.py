"""The training curves of a run.

    DIR/metrics.jsonl                    one object a line: kind, task_index, task, step and numbers
    DIR/tensorboard/{i:02d}-{task}/      the same curves as TensorBoard events, one sub-run for each task

Task numbers are task_index, counted from 0. Only process 0 of a run on several hosts writes.
JSON has no NaN: it is written as null. In an object store there are no TensorBoard events: their files grow.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sapt_jax.storage.paths import as_path, is_remote
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


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
        writer = self._writer(task_index, task)
        for tag, value in _curves(kind, {key: record[key] for key in numbers}):
            writer.add_scalar(tag, value, step)
        return True

    def show(self, task_index: int, task: str, images: Iterable[tuple[str, np.ndarray]]) -> None:
        """Puts images [H, W, 3] uint8 beside a task's curves, as figures/NAME; where none are kept, none are made."""
        if self._is_writer and self._lines is None:
            writer = self._writer(task_index, task)
            for name, pixels in images:
                writer.add_image(f"figures/{name}", pixels, 0, dataformats="HWC")

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

    def _writer(self, task_index: int, task: str) -> "SummaryWriter":
        # Imported on use: it brings PyTorch where that is installed, which takes seconds.
        from tensorboardX import SummaryWriter

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
