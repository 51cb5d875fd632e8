import io

import numpy as np
import pytest

from sapt_jax import compare
from sapt_jax.results import metrics
from sapt_jax.results.scores import Scores, write_scores


def _write(folder, method, matrix, task_order=("a", "b"), kind="lora"):
    write_scores(
        folder,
        Scores(
            method=method,
            task_order=task_order,
            metric_per_task=dict.fromkeys(task_order, "rouge_l"),
            matrix=matrix,
            summary=metrics.summarise(metrics.finished_part(matrix), None),
            seeds={"seed": 0},
            protocol={"pet.kind": kind},
            config={},
        ),
    )


@pytest.fixture
def two_runs(tmp_path):
    _write(tmp_path / "one", "sapt", np.array([[50.0, np.nan], [48.5, 60.0]]))
    _write(tmp_path / "two", "sequential", np.array([[51.0, np.nan], [7.5, 61.0]]))
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_prints_both_runs_by_method(two_runs):
    output = io.StringIO()
    assert compare.main(two_runs, output) == 0
    text = output.getvalue()
    for expected in ("SAPT-LoRA", "sequential LoRA", "50.0 →  48.5", "51.0 →   7.5", "1.5", "43.5", "54.2", "34.2"):
        assert expected in text


def test_two_runs_of_one_method_are_named_by_folder(two_runs, tmp_path):
    _write(tmp_path / "again", "sapt", np.array([[49.0, np.nan], [44.5, 62.0]]))
    output = io.StringIO()
    assert compare.main([two_runs[0], str(tmp_path / "again")], output) == 0
    heading = next(line for line in output.getvalue().splitlines() if line.split()[:1] == ["task"])
    assert heading.split() == ["task", "one", "again"]


def test_a_run_of_prompts_is_not_called_lora(two_runs, tmp_path):
    _write(tmp_path / "prompts", "sapt", np.array([[49.0, np.nan], [44.5, 62.0]]), kind="prompt")
    output = io.StringIO()
    assert compare.main([two_runs[0], str(tmp_path / "prompts")], output) == 0
    assert "SAPT-LoRA" in output.getvalue() and "SAPT-Prompt" in output.getvalue()


def test_any_number_of_runs_shares_one_table(two_runs, tmp_path):
    _write(tmp_path / "alone", "single_task", np.array([[52.0, np.nan], [52.0, 62.0]]))
    output = io.StringIO()
    assert compare.main([*two_runs, str(tmp_path / "alone")], output) == 0
    rows = {line.split("  ")[0].strip(): line.split() for line in output.getvalue().splitlines()}
    # Runs, AP, F.Ra, BWT, and FWT against the run that trained each task alone.
    assert rows["SAPT-LoRA"][1:6] == ["1", "54.2", "1.5", "-1.5", "-2.0"]
    assert rows["sequential LoRA"][2:7] == ["1", "34.2", "43.5", "-43.5", "-1.0"]
    assert rows["single_task"][1:6] == ["1", "57.0", "0.0", "0.0", "0.0"]


def test_a_run_beside_itself(two_runs):
    output = io.StringIO()
    assert compare.main([two_runs[0], two_runs[0] + "/"], output) == 0
    assert output.getvalue().count("50.0 →  48.5") == 2


def test_an_unfinished_run_is_shown_as_far_as_it_got(two_runs, tmp_path):
    _write(tmp_path / "part", "sequential", np.array([[51.0, np.nan], [np.nan, np.nan]]))
    output = io.StringIO()
    assert compare.main([two_runs[0], str(tmp_path / "part")], output) == 0
    assert "51.0 →     –" in output.getvalue()


def test_what_cannot_be_compared_is_one_line_on_stderr(two_runs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        compare.main([two_runs[0], str(tmp_path / "absent")], io.StringIO())
    assert "absent/scores.json: no such file" in capsys.readouterr().err
    _write(tmp_path / "other", "sequential", np.array([[51.0, np.nan], [7.5, 61.0]]), task_order=("b", "a"))
    with pytest.raises(SystemExit, match="^2$"):
        compare.main([two_runs[0], str(tmp_path / "other")], io.StringIO())
    assert "different task orders" in capsys.readouterr().err
