import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from sapt_jax.data.task import Instance
from sapt_jax.results import metrics, run_log

TASKS = ("first", "second", "third")


def _write(workdir, **changes):
    matrix = metrics.with_row(metrics.empty_matrix(3), 0, [12.5])
    arguments = {
        "method": "sapt",
        "task_order": TASKS,
        "metric_per_task": dict.fromkeys(TASKS, "rouge_l"),
        "matrix": matrix,
        "summary": metrics.summarise(metrics.finished_part(matrix), None),
        "seeds": {"seed": 1},
        "protocol": {"references": "best"},
        "config": ConfigDict({"train": {"epochs": 2}, "buckets": ((16, 8),)}),
    }
    return run_log.write_scores(workdir, **(arguments | changes))


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


def test_to_jsonable_reads_back_and_turns_nan_into_null():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 3))
    value = {
        "matrix": matrix,
        "device": jnp.arange(3),
        "nothing": [np.nan, float("inf"), np.float32(-np.inf), None],
        "scalars": (np.int32(3), np.bool_(True), 7, "x"),
        Path("a"): Path("b/c"),
        "set": {"b", "a"},
    }
    back = json.loads(json.dumps(run_log.to_jsonable(value), allow_nan=False))
    np.testing.assert_array_equal(back["matrix"], matrix)
    assert back["device"] == [0, 1, 2]
    assert back["nothing"] == [None] * 4
    assert back["scalars"] == [3, True, 7, "x"]
    assert back["a"] == "b/c"
    assert back["set"] == ["a", "b"]


def test_to_jsonable_names_what_it_cannot_write():
    with pytest.raises(TypeError, match="object"):
        run_log.to_jsonable({"x": object()})


def test_scores_read_back(tmp_path):
    _write(tmp_path, category_scores={"a": 1.0}, single_task_scores=None)
    scores = run_log.read_scores(tmp_path)
    expected = metrics.with_row(metrics.empty_matrix(3), 0, [12.5])
    np.testing.assert_array_equal(scores["matrix"], expected)
    assert scores["task_order"] == list(TASKS)
    assert scores["summary"] == {"AP": 12.5, "F.Ra": None, "FWT": None, "BWT": None}
    assert scores["config"] == {"train": {"epochs": 2}, "buckets": [[16, 8]]}
    assert scores["protocol"] == {"references": "best"}
    assert scores["category_scores"] == {"a": 1.0}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = _write(tmp_path)
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        _write(tmp_path, method="seq_lora")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "scores.json: broken JSON"),
        ("[]", "not the scores of a run"),
        ('{"format": 1, "method": "sapt"}', "without task_order"),
    ],
)
def test_broken_scores_are_named(tmp_path, text, message):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run_log.read_scores(tmp_path)


def test_scores_of_another_format_or_size_are_named(tmp_path):
    path = _write(tmp_path)
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        run_log.read_scores(tmp_path)
    path.write_text(json.dumps(scores | {"task_order": ["one"]}))
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*1 tasks"):
        run_log.read_scores(tmp_path)


def test_missing_scores_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores.json.*--workdir"):
        run_log.read_scores(tmp_path)


def test_predictions_hold_one_line_for_each_instance(tmp_path):
    rng = np.random.default_rng(1)
    instances = [Instance(id=f"i{n}", input="naïve\ninput", outputs=("a", "b")) for n in range(4)]
    weights = rng.dirichlet(np.ones(3), size=4).astype(np.float32)
    path = run_log.write_predictions(
        tmp_path,
        task_order=TASKS,
        task_index=2,
        tested_index=0,
        instances=instances,
        predictions=["p"] * 4,
        scores=np.arange(4.0),
        attention_weights=jnp.asarray(weights),
    )
    assert path == tmp_path / "predictions" / "02-third" / "00-first.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["i0", "i1", "i2", "i3"]
    assert [line["score"] for line in lines] == [0.0, 1.0, 2.0, 3.0]
    assert lines[0]["input"] == "naïve\ninput" and lines[0]["references"] == ["a", "b"]
    np.testing.assert_allclose([line["attention_weights"] for line in lines], weights, atol=1e-6)


def test_predictions_need_one_of_everything(tmp_path):
    with pytest.raises(ValueError):
        run_log.write_predictions(
            tmp_path,
            task_order=TASKS,
            task_index=0,
            tested_index=0,
            instances=[Instance("a", "", ("x",))],
            predictions=[],
            scores=[1.0],
            attention_weights=None,
        )


def test_a_resumed_log_goes_on_without_gap_or_repeat(tmp_path):
    with run_log.RunLog(tmp_path, resume_from=None) as log:
        _log_steps(log, 0, (1, 2, 3))
        _log_steps(log, 0, (3,), kind="scores")
        _log_steps(log, 1, (1, 2, 3, 4))
        _log_steps(log, 2, (1,))
    with run_log.RunLog(tmp_path, resume_from=(1, 2)) as log:
        _log_steps(log, 0, (3,), kind="scores")
        _log_steps(log, 1, (2, 3))
    expected = [(0, 1), (0, 2), (0, 3), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert [position[:2] for position in _positions(tmp_path)] == expected
    assert sum(kind == "scores" for _, _, kind in _positions(tmp_path)) == 1


def test_a_log_cut_inside_a_line_is_mended(tmp_path):
    with run_log.RunLog(tmp_path, resume_from=None) as log:
        _log_steps(log, 0, (1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    with run_log.RunLog(tmp_path, resume_from=(0, 2)) as log:
        _log_steps(log, 0, (2, 3))
    assert _positions(tmp_path) == [(0, 1, "train"), (0, 2, "train"), (0, 3, "train")]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "task_index": 0, "step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        run_log.RunLog(tmp_path, resume_from=(0, 1))


def test_a_new_run_starts_an_empty_log(tmp_path):
    for _ in range(2):
        with run_log.RunLog(tmp_path, resume_from=None) as log:
            _log_steps(log, 0, (1,))
    assert len(_records(tmp_path)) == 1
    assert len(_events(tmp_path / "tensorboard" / "00-first")) == 1


def test_tensorboard_holds_the_same_curves(tmp_path):
    with run_log.RunLog(tmp_path, resume_from=None) as log:
        log.log("train", task_index=1, task="second", step=5, loss=0.25, attention=np.array([0.5, np.nan, 0.125]))
    events = _events(tmp_path / "tensorboard" / "01-second")
    assert events == [(5, "train/loss", 0.25), (5, "train/attention/00", 0.5), (5, "train/attention/02", 0.125)]
    assert _records(tmp_path)[0]["attention"] == [0.5, None, 0.125]


def test_resume_drops_the_events_of_later_tasks(tmp_path):
    with run_log.RunLog(tmp_path, resume_from=None) as log:
        for task_index in range(3):
            _log_steps(log, task_index, (1,))
    with run_log.RunLog(tmp_path, resume_from=(1, 1)):
        pass
    assert sorted(folder.name for folder in (tmp_path / "tensorboard").iterdir()) == ["00-first", "01-second"]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _write(tmp_path)
    with run_log.RunLog(tmp_path, resume_from=None) as log:
        _log_steps(log, 0, (1,))
    run_log.write_predictions(
        tmp_path,
        task_order=TASKS,
        task_index=0,
        tested_index=0,
        instances=[Instance("a", "", ("x",))],
        predictions=["x"],
        scores=[1.0],
        attention_weights=None,
    )
    assert list(tmp_path.iterdir()) == []
