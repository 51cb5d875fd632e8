import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.data.task import Instance
from sapt_jax.results.predictions import (
    Answers,
    predictions_file,
    read_predictions,
    round_weights,
    write_predictions,
)

TASKS = ("first", "second", "third")


def _write(workdir, scores, texts=None, weights=None):
    instances = [Instance(f"i{n}", "an\x85input", ("x",)) for n in range(len(scores))]
    file = predictions_file(workdir, TASKS, 0, 1)
    write_predictions(file, Answers(instances, ["x"] * len(scores) if texts is None else texts, scores, weights))
    return file


def test_predictions_hold_one_line_for_each_instance(tmp_path):
    rng = np.random.default_rng(1)
    instances = [Instance(id=f"i{n}", input="naïve\ninput", outputs=("a", "b")) for n in range(4)]
    weights = rng.dirichlet(np.ones(3), size=4).astype(np.float32)
    path = predictions_file(tmp_path, TASKS, task_index=2, tested_index=0)
    write_predictions(path, Answers(instances, ["p"] * 4, np.arange(4.0), jnp.asarray(weights)))
    assert path == tmp_path / "predictions" / "02-third" / "00-first.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["i0", "i1", "i2", "i3"]
    assert [line["score"] for line in lines] == [0.0, 1.0, 2.0, 3.0]
    assert lines[0]["input"] == "naïve\ninput" and lines[0]["references"] == ["a", "b"]
    np.testing.assert_allclose([line["attention_weights"] for line in lines], weights, atol=1e-6)


def test_predictions_need_one_of_everything(tmp_path):
    with pytest.raises(ValueError):
        _write(tmp_path, [1.0], texts=[])


def test_scores_read_back_in_order(tmp_path):
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 3)
    scores, read = read_predictions(_write(tmp_path, [0.0, 100.0, 12.5], weights=weights))
    assert scores.tolist() == [0.0, 100.0, 12.5]
    np.testing.assert_array_equal(read, round_weights(weights))
    assert read_predictions(_write(tmp_path, [1.0]))[1] is None


@pytest.mark.parametrize("line", ["nonsense", '{"id": "i1"}', '{"id": "i1", "score": null}', "[]"])
def test_a_line_without_a_score_is_named(tmp_path, line):
    file = _write(tmp_path, [50.0])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"01-second.jsonl, line 2: .* delete the file"):
        read_predictions(file)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _write(tmp_path, [1.0])
    assert list(tmp_path.iterdir()) == []
