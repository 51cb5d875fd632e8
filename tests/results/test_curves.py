import json

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sapt_jax.results.curves import RunLog

TASKS = ("first", "second", "third")


def _records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _positions(workdir):
    return [(record["task_index"], record["step"], record["kind"]) for record in _records(workdir)]


def _log_steps(log, task_index, steps, kind="train"):
    for step in steps:
        log.log(kind, task_index=task_index, task=TASKS[task_index], step=step, loss=1.0 / step)


def _events(folder):
    """(step, tag, value) of the scalars in a folder's event files, in order of the files' names."""
    found = []
    for file in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_a_resumed_log_goes_on_without_gap_or_repeat(tmp_path):
    with RunLog(tmp_path, resume_from=None) as log:
        _log_steps(log, 0, (1, 2, 3))
        _log_steps(log, 0, (3,), kind="scores")
        _log_steps(log, 1, (1, 2, 3, 4))
        _log_steps(log, 2, (1,))
    with RunLog(tmp_path, resume_from=(1, 2)) as log:
        _log_steps(log, 0, (3,), kind="scores")
        _log_steps(log, 1, (2, 3))
    expected = [(0, 1), (0, 2), (0, 3), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert [position[:2] for position in _positions(tmp_path)] == expected
    assert sum(kind == "scores" for _, _, kind in _positions(tmp_path)) == 1


def test_a_log_cut_inside_a_line_is_mended(tmp_path):
    with RunLog(tmp_path, resume_from=None) as log:
        _log_steps(log, 0, (1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    with RunLog(tmp_path, resume_from=(0, 2)) as log:
        _log_steps(log, 0, (2, 3))
    assert _positions(tmp_path) == [(0, 1, "train"), (0, 2, "train"), (0, 3, "train")]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "task_index": 0, "step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        RunLog(tmp_path, resume_from=(0, 1))


def test_a_new_run_starts_an_empty_log(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, resume_from=None) as log:
            _log_steps(log, 0, (1,))
    assert len(_records(tmp_path)) == 1
    assert len(_events(tmp_path / "tensorboard" / "00-first")) == 1


def test_tensorboard_holds_the_same_curves(tmp_path):
    with RunLog(tmp_path, resume_from=None) as log:
        log.log("train", task_index=1, task="second", step=5, loss=0.25, attention=np.array([0.5, np.nan, 0.125]))
    events = _events(tmp_path / "tensorboard" / "01-second")
    assert events == [(5, "train/loss", 0.25), (5, "train/attention/00", 0.5), (5, "train/attention/02", 0.125)]
    assert _records(tmp_path)[0]["attention"] == [0.5, None, 0.125]


def test_resume_drops_the_events_of_later_tasks(tmp_path):
    with RunLog(tmp_path, resume_from=None) as log:
        for task_index in range(3):
            _log_steps(log, task_index, (1,))
    with RunLog(tmp_path, resume_from=(1, 1)):
        pass
    assert sorted(folder.name for folder in (tmp_path / "tensorboard").iterdir()) == ["00-first", "01-second"]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with RunLog(tmp_path, resume_from=None) as log:
        _log_steps(log, 0, (1,))
    assert list(tmp_path.iterdir()) == []
