import json
import math

import numpy as np
import pytest

from sapt_jax.results.record import padded, read_record
from tests.helpers.left_behind import write_quality, write_run


def test_a_whole_run_has_no_gaps(tmp_path):
    run = write_run(tmp_path / "run", rows=4)
    write_quality(run, 1, "mirror", copies=0.25)
    record = read_record(run)
    assert (record.name, record.method, record.tasks, record.finished) == (
        "run",
        "sapt",
        ("shout", "mirror", "first"),
        3,
    )
    assert record.gaps == ()
    stored = json.loads((run / "scores.json").read_text())
    np.testing.assert_array_equal(record.matrix, np.array(stored["matrix"], float))
    assert [row["step"] for row in record.logged("train", 1)] == [2, 4, 6, 8, 10, 12]
    answers = record.answers(2, 0)
    assert len(answers) == 4
    np.testing.assert_array_equal(record.weights(2, 0), [row["attention_weights"] for row in answers])
    assert record.samples() == {1: {**record.samples()[1], "copies": 0.25}}
    assert np.isnan(record.seconds).all() and math.isnan(record.peak_bytes)


def test_costs_are_read_by_task(tmp_path):
    costs = {"shout": {"seconds": 2.5, "peak_bytes": 10}, "mirror": {"seconds": 4, "peak_bytes": 30}, "first": None}
    record = read_record(write_run(tmp_path / "run", extra={"costs": costs}))
    np.testing.assert_array_equal(record.seconds, [2.5, 4.0, np.nan])
    assert record.peak_bytes == 30


def test_a_run_in_progress_is_read_as_far_as_it_is(tmp_path):
    half = read_record(write_run(tmp_path / "half", finished=2))
    assert half.finished == 2 and any("2 of 3 tasks" in gap for gap in half.gaps)
    young = read_record(write_run(tmp_path / "young", finished=0))
    assert young.finished == 0 and young.tasks == ("shout", "mirror", "first")
    assert any("No task is finished" in gap for gap in young.gaps)
    assert young.matrix.shape == (3, 3) and young.answers(0, 0) == []


@pytest.mark.parametrize("broken", ["{", "[]", '{"format": 1}'])
def test_broken_files_are_named_and_the_rest_is_read(tmp_path, broken):
    run = write_run(tmp_path / "run")
    for name in ("scores.json", "config.json"):
        (run / name).write_text(broken)
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"kind": "train", "task_ind')
    record = read_record(run)
    assert any("scores.json" in gap for gap in record.gaps)
    assert any("1 lines of metrics.jsonl" in gap for gap in record.gaps)
    assert record.tasks == ("shout", "mirror", "first") and record.logged("train", 2)


def test_a_line_ends_at_a_newline_alone(tmp_path):
    run = write_run(tmp_path / "run", text="one\u2028two\x85three")
    assert [row["input"] for row in read_record(run).answers(0, 0)][:1] == ["say 0 one\u2028two\x85three"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run lies here"):
        read_record(tmp_path)


def test_padded_makes_numbers_of_anything():
    np.testing.assert_array_equal(padded([1, None, "x", True, 2.5], 6), [1, np.nan, np.nan, np.nan, 2.5, np.nan])
    np.testing.assert_array_equal(padded([1, 2, 3], 2), [1, 2])
