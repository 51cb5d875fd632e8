import json
import math

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


INPUT = "an\x85input"


def asked(count):
    return [Instance(f"i{n}", INPUT, ("x",)) for n in range(count)]


def _write(workdir, scores, texts=None, weights=None):
    instances = [Instance(f"i{n}", INPUT, ("x",)) for n in range(len(scores))]
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
    scores, read = read_predictions(_write(tmp_path, [0.0, 100.0, 12.5], weights=weights), asked(3))
    assert scores.tolist() == [0.0, 100.0, 12.5]
    np.testing.assert_array_equal(read, round_weights(weights))
    assert read_predictions(_write(tmp_path, [1.0]), asked(1))[1] is None


GOOD = {"id": "i1", "input": INPUT, "prediction": "x", "references": ["x"], "score": 50.0, "attention_weights": None}


@pytest.mark.parametrize(
    "line",
    [
        "nonsense", "", "[]", "{}", "\udcff", "[" * 100_000,
        *(json.dumps({**GOOD, "score": score}) for score in (None, "50", 1e9, -1, True, math.nan, [1])),
        *(json.dumps({**GOOD, "attention_weights": weights}) for weights in ([1.0], "a", [math.nan])),
        json.dumps({"score": 1}),
    ],
    ids=lambda line: line[:12],
)  # fmt: skip
def test_a_line_without_a_score_is_named(tmp_path, line):
    file = _write(tmp_path, [50.0])
    file.write_bytes(file.read_bytes() + (line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"01-second.jsonl, line 2 .* Delete the file, and the same command") as error:
        read_predictions(file, asked(2))
    assert len(str(error.value)) < 400


def test_lines_end_at_newlines_alone(tmp_path):
    """Separators of Unicode and carriage returns stand in texts, as they are or escaped."""
    texts = ["a\u2028b", "a\u2029b\x85", "a\rb", "\x0b\x0c\x1c\x1d\x1e"]
    instances = [Instance(f"i{n}", text, (text,)) for n, text in enumerate(texts)]
    file = predictions_file(tmp_path, TASKS, 0, 1)
    write_predictions(file, Answers(instances, texts, [1.0, 2.0, 3.0, 4.0], None))
    assert read_predictions(file, instances)[0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_answers_are_to_the_test_set_of_today(tmp_path):
    file = _write(tmp_path, [50.0, 0.0, 100.0])
    read_predictions(file, asked(3))
    whole = file.read_bytes()
    for cut in (0, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"01-second.jsonl was cut short: it has [012] of 3 rows. Delete the file"):
            read_predictions(file, asked(3))
    file.write_bytes(whole)
    same = Instance("i", INPUT, ("x",))
    for instances, row in (
        (asked(2), 3),
        ([same, Instance("i", "mended", ("x",)), same], 2),
        ([same, same, Instance("i", INPUT, ("x", "y"))], 3),
    ):
        with pytest.raises(ValueError, match=rf"the rows of the test set have changed .* from row {row} on"):
            read_predictions(file, instances)
    assert file.read_bytes() == whole


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _write(tmp_path, [1.0])
    assert list(tmp_path.iterdir()) == []
