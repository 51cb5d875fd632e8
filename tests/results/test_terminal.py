import io
import re

import numpy as np
import pytest
from rich.console import Console

from sapt_jax.results import metrics, terminal

TASKS = ("sentiment", "numbers", "cities")
METRICS = {"sentiment": "exact_match", "numbers": "rouge_l", "cities": "exact_match"}


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _show(renderable, width=100):
    output = io.StringIO()
    Console(file=output, width=width, highlight=False).print(renderable)
    return output.getvalue()


def _numbers(text):
    return [float(found) for found in re.findall(r"\d+\.\d", text)]


def _matrix(num_tasks, seed=0):
    matrix = np.random.default_rng(seed).uniform(10, 99, (num_tasks, num_tasks)).round(1)
    matrix[np.triu_indices(num_tasks, 1)] = np.nan
    return matrix


def _run(matrix, **changes):
    run = {
        "method": "sapt",
        "task_order": list(TASKS),
        "metric_per_task": METRICS,
        "matrix": matrix,
        "summary": metrics.summarise(matrix, None),
        "seeds": {"seed": 0},
        "protocol": {"references": "best"},
    }
    return run | changes


def test_score_table_shows_the_lower_triangle():
    matrix = _matrix(3)
    text = _show(terminal.score_table(matrix, TASKS, METRICS, title="sapt", width=100))
    rows = [line for line in text.splitlines() if re.match(r"\s*\d \w", line)]
    assert [row.split()[1] for row in rows] == list(TASKS)
    for index, row in enumerate(rows):
        assert _numbers(row) == matrix[index, : index + 1].tolist()
    assert "exact match of 1, 3; ROUGE-L of 2" in " ".join(text.split())


def test_score_table_ends_with_the_last_finished_task():
    matrix = _matrix(3)
    matrix[1:] = np.nan
    text = _show(terminal.score_table(matrix, TASKS, METRICS, title="sapt", width=100))
    assert _numbers(text) == [matrix[0, 0]]
    assert "numbers" not in text


@pytest.mark.parametrize("width", [80, 120, 140])
def test_fifteen_tasks_fit(width):
    names = [f"task{n:04d}_a_name_as_long_as_they_come_in_superni" for n in range(15)]
    matrix = _matrix(15)
    text = _show(
        terminal.score_table(matrix, names, dict.fromkeys(names, "rouge_l"), title="sapt", width=width), width=width
    )
    rows = [line for line in text.splitlines() if re.match(r"\s*\d+ task", line)]
    assert len(rows) == 15
    assert max(map(len, text.splitlines())) <= width
    shown = [float(number) for number in rows[-1].split()[-15:]]
    np.testing.assert_allclose(shown, matrix[-1], atol=0.5)


def test_closing_summary_shows_figures_protocol_and_places(tmp_path):
    told = {
        "summary": {"AP": 51.234, "F.Ra": 0.9, "FWT": None, "BWT": -0.57},
        "routing": {"accuracy": 0.875},
        "general": {"before": 3.0, "after": 3.0125, "lost": 0.0125},
        "protocol": {"dev_is_test": True},
    }
    text = _show(terminal.closing_summary(told, {"scores": tmp_path / "s.json"}), width=300)
    for expected in ("51.23", "0.90", "-0.57", "87.5%", "+0.013", "dev_is_test=True", str(tmp_path / "s.json")):
        assert expected in text
    assert re.search(r"FWT\s+–", text)


@pytest.mark.parametrize("width", [60, 100, 160])
def test_two_runs_in_one_format(width):
    first, second = _matrix(3, seed=1), _matrix(3, seed=2)
    text = _show(terminal.compare_runs(("one", "two"), (_run(first), _run(second)), width=width), width=width)
    shown = _numbers(text)
    for matrix in (first, second):
        assert all(value in shown for value in matrix[np.tril_indices(3)])
        assert f"{metrics.average_performance(matrix):.1f}" in text
        assert f"{metrics.forgetting_rate(matrix):.1f}" in text
    for index, task in enumerate(TASKS):
        line = next(line for line in text.splitlines() if task in line and "→" in line)
        assert _numbers(line) == [first[index, index], first[-1, index], second[index, index], second[-1, index]]
    assert "do not measure the same" not in text


def test_runs_of_different_protocols_are_told_apart():
    matrix = _matrix(3)
    other = _run(matrix, protocol={"references": "first"}, seeds={"seed": 9})
    text = _show(terminal.compare_runs(("one", "two"), (_run(matrix), other), width=200), width=200)
    assert "protocol.references is best and first" in text
    assert "seeds.seed is 0 and 9" in text


def test_a_methods_own_protocol_is_compared_among_its_runs_alone():
    matrix, own = _matrix(3), [{"references": "best", "sapt.pool_padding": padding} for padding in (False, True)]
    other = _run(matrix, method="replay")
    text = _show(terminal.compare_runs(("one", "two"), (_run(matrix, protocol=own[0]), other), width=200), width=200)
    assert "do not measure the same" not in text
    runs = (*(_run(matrix, protocol=protocol) for protocol in own), other)
    text = _show(terminal.compare_runs(("one", "two", "three"), runs, width=200), width=200)
    assert "protocol.sapt.pool_padding is False and True\n" in text


def test_runs_say_what_was_told_seen_and_kept():
    matrix = _matrix(3)
    labels = {"needs_task_id": True, "routing": "method", "old_data": "real", "rows": 7, "bytes": 1_234_567}
    text = _show(
        terminal.compare_runs(("one", "two"), (_run(matrix, labels=labels), _run(matrix)), width=120), width=120
    )
    assert "one: told the task: yes; old data: real, 7 rows; kept: 1.23 MB" in text
    assert "two: told the task: –; old data: –; kept: –" in text


def test_runs_of_different_orders_cannot_be_compared():
    matrix = _matrix(3)
    other = _run(matrix, task_order=["numbers", "sentiment", "cities"])
    with pytest.raises(ValueError, match="task orders"):
        terminal.compare_runs(("one", "two"), (_run(matrix), other), width=100)


def test_progress_without_a_terminal_is_a_line_now_and_then():
    output, clock = io.StringIO(), _Clock()
    console = terminal.make_console(output)
    with terminal.TrainingProgress(console, "task 1/3 sentiment", 100, clock=clock) as progress:
        for step in range(1, 31):
            clock.now += 1.0
            progress.update(step, tokens=50, loss=2.0 if step < 15 else 1.0)
    lines = output.getvalue().splitlines()
    assert lines[0] == "task 1/3 sentiment  step 10/100  loss 2.000  50 tokens/s  1:30 left"
    assert lines[1] == "task 1/3 sentiment  step 20/100  loss 1.000  50 tokens/s  1:20 left"
    assert "step 30/100" in lines[-1]
    assert len(lines) <= 4
    assert "\x1b" not in output.getvalue()


def test_progress_of_a_resumed_task_counts_only_its_own_steps():
    clock = _Clock()
    progress = terminal.TrainingProgress(terminal.make_console(io.StringIO()), "task", 100, first_step=60, clock=clock)
    clock.now += 20.0
    progress.update(70, tokens=1000)
    assert progress.figures() == "50 tokens/s  1:00 left"


def test_progress_on_a_terminal_is_a_bar():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with terminal.TrainingProgress(console, "task 1/3 sentiment", 4) as progress:
        for step in range(1, 5):
            progress.update(step, tokens=10, loss=0.5)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "task 1/3 sentiment" in text and "4/4" in text and "loss 0.500" in text


def test_progress_with_nothing_done_yet():
    output = io.StringIO()
    with terminal.TrainingProgress(terminal.make_console(output), "task", 10):
        pass
    assert output.getvalue().strip() == "task  step 0/10"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (4000, "1:06:40"), (-3, "0:00")])
def test_format_duration(seconds, text):
    assert terminal.format_duration(seconds) == text
