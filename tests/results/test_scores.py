import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sapt_jax.results import metrics
from sapt_jax.results.scores import Scores, read_scores, write_scores

TASKS = ("first", "second", "third")


def _write(workdir, **extra):
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
    return write_scores(workdir, Scores(**arguments, extra=extra))


def test_scores_read_back(tmp_path):
    _write(tmp_path, category_scores={"a": 1.0}, single_task_scores=None)
    scores = read_scores(tmp_path)
    expected = metrics.with_row(metrics.empty_matrix(3), 0, [12.5])
    np.testing.assert_array_equal(scores["matrix"], expected)
    assert scores["task_order"] == list(TASKS)
    assert scores["summary"] == {"AP": 12.5, "F.Ra": None, "FWT": None, "BWT": None, "LA": 12.5, "IM": None}
    assert scores["config"] == {"train": {"epochs": 2}, "buckets": [[16, 8]]}
    assert scores["protocol"] == {"references": "best"}
    assert scores["category_scores"] == {"a": 1.0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "scores.json is not valid JSON"),
        ("[]", "scores.json holds a JSON list"),
        ('{"format": 1, "method": "sapt"}', "without task_order"),
    ],
)
def test_broken_scores_are_named(tmp_path, text, message):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path)


def test_scores_of_another_format_or_size_are_named(tmp_path):
    path = _write(tmp_path)
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_scores(tmp_path)
    for changes, fault in (
        ({"matrix": [[1.0]]}, "its matrix is not 3 rows of 3"),
        ({"matrix": [[1.0], [1.0, 2.0], []]}, "its matrix is not 3 rows of 3"),
        ({"matrix": {"a": 1}}, "its matrix is a dict, not a list"),
        ({"matrix": [["x"] * 3] * 3}, "a score is no finite number"),
        ({"summary": {"AP": "high"}}, "a score is no finite number"),
        ({"task_order": ["one"]}, "its task_order is not of tasks in metric_per_task"),
        ({"task_order": "one"}, "its task_order is a str, not a list"),
        ({"task_order": []}, "its task_order is not of tasks"),
        ({"protocol": None}, "its protocol is a NoneType, not a dict"),
        ({"method": 3}, "its method is a int, not a str"),
    ):
        path.write_text(json.dumps(scores | changes))
        with pytest.raises(ValueError, match=f"scores.json: {fault}"):
            read_scores(tmp_path)


def test_missing_scores_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores.json.*--workdir"):
        read_scores(tmp_path)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _write(tmp_path)
    assert list(tmp_path.iterdir()) == []
