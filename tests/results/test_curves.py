import json
import math

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from sapt_jax.results.curves import RunLog

TASKS = ("first", "second", "third")


def stand(step):
    """The first task is finished, the second has saved this step, the third has not begun."""
    return list(zip(TASKS, (math.inf, step, 0), strict=True))


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
    with RunLog(tmp_path, stand=None) as log:
        _log_steps(log, 0, (1, 2, 3))
        _log_steps(log, 0, (3,), kind="scores")
        _log_steps(log, 1, (1, 2, 3, 4))
        _log_steps(log, 2, (1,))
    with RunLog(tmp_path, stand=stand(2)) as log:
        _log_steps(log, 0, (3,), kind="scores")
        _log_steps(log, 1, (2, 3))
    expected = [(0, 1), (0, 2), (0, 3), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert [position[:2] for position in _positions(tmp_path)] == expected
    assert sum(kind == "scores" for _, _, kind in _positions(tmp_path)) == 1


def test_a_log_cut_inside_a_line_is_mended(tmp_path):
    with RunLog(tmp_path, stand=None) as log:
        _log_steps(log, 0, (1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    with RunLog(tmp_path, stand=[(TASKS[0], 2)]) as log:
        _log_steps(log, 0, (2, 3))
    assert _positions(tmp_path) == [(0, 1, "train"), (0, 2, "train"), (0, 3, "train")]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "task_index": 0, "step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        RunLog(tmp_path, stand=[(TASKS[0], 1)])


def test_a_new_run_starts_an_empty_log(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, stand=None) as log:
            _log_steps(log, 0, (1,))
    assert len(_records(tmp_path)) == 1
    assert len(_events(tmp_path / "tensorboard" / "00-first")) == 1


def test_tensorboard_holds_the_same_curves(tmp_path):
    with RunLog(tmp_path, stand=None) as log:
        log.log("train", task_index=1, task="second", step=5, loss=0.25, attention=np.array([0.5, np.nan, 0.125]))
    events = _events(tmp_path / "tensorboard" / "01-second")
    assert events == [(5, "train/loss", 0.25), (5, "train/attention/00", 0.5), (5, "train/attention/02", 0.125)]
    assert _records(tmp_path)[0]["attention"] == [0.5, None, 0.125]


def test_resume_drops_the_events_of_later_tasks(tmp_path):
    with RunLog(tmp_path, stand=None) as log:
        for task_index in range(3):
            _log_steps(log, task_index, (1,))
    with RunLog(tmp_path, stand=stand(1)):
        pass
    assert [len(_events(tmp_path / "tensorboard" / f"0{index}-{name}")) for index, name in enumerate(TASKS)] == [
        1,
        1,
        0,
    ]


@pytest.mark.parametrize("finished", [False, True])
def test_events_that_a_killed_run_had_not_written_are_there_after_the_next_start(tmp_path, finished):
    """The writer keeps what it is given in memory for two minutes, the lines are written at once."""
    with RunLog(tmp_path, stand=None) as log:
        _log_steps(log, 0, (1, 2))
        _log_steps(log, 1, (1, 2, 3))
    folder = tmp_path / "tensorboard" / "01-second"
    for file in folder.iterdir():
        file.write_bytes(b"")
    step = math.inf if finished else 2
    with RunLog(tmp_path, stand=stand(step)) as log:
        _log_steps(log, 1, (2, 3, 4))
    assert [event[0] for event in _events(folder)] == [1, 2, 3, 4]
    assert [event[0] for event in _events(tmp_path / "tensorboard" / "00-first")] == [1, 2]
    assert [position[:2] for position in _positions(tmp_path)] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_what_is_not_the_runs_own_is_left_alone(tmp_path):
    with RunLog(tmp_path, stand=None) as log:
        _log_steps(log, 0, (1,))
    for name in ("old-run", "07-other", "notes", "[x]", "3-short"):
        (tmp_path / "tensorboard" / name).mkdir()
        (tmp_path / "tensorboard" / name / "events.mine").write_bytes(b"mine")
    (tmp_path / "tensorboard" / "00-first" / "notes.txt").write_text("mine")
    with RunLog(tmp_path, stand=stand(1)):
        pass
    assert len(list((tmp_path / "tensorboard").glob("*/events.mine"))) == 5
    assert (tmp_path / "tensorboard" / "00-first" / "notes.txt").is_file()


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "train", "task_index": "0", "step": 1}', "[" * 9**6])
def test_lines_that_are_no_records(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 .* Delete the line") as error:
        RunLog(tmp_path, stand=stand(1))
    assert len(str(error.value)) < 400


def test_a_folder_in_place_of_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="metrics.jsonl is a folder where a file should be"):
        RunLog(tmp_path, stand=stand(1))


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with RunLog(tmp_path, stand=None) as log:
        _log_steps(log, 0, (1,))
    assert list(tmp_path.iterdir()) == []
