"""What a run shows on the terminal: progress of training, score matrices, the closing summary, two runs side by side.

Everything is drawn by rich. Where the output is no terminal (a file, CI), progress is one plain line now and then.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sapt_jax.results import comparison
from sapt_jax.results.labels import one_line

METRIC_NAMES = {"rouge_l": "ROUGE-L", "exact_match": "exact match", "exact_match_of_words": "exact match of words"}
SUMMARY_MEANINGS = {
    "AP": "mean score at the end, ↑ is better",
    "F.Ra": "lost from each task's best, ↓ is better",
    "FWT": "gained over training alone, ↑ is better",
    "BWT": "change since learned, ↑ is better",
    "LA": "mean score just after learning, ↑ is better",
    "IM": "lost to training on all tasks at once, ↓ is better",
}
_LINE_EVERY_SECONDS = 10.0
_LEAST_NAME_WIDTH = 18


def make_console(file: TextIO | None = None) -> Console:
    """A console on `file` (stdout by default), wide enough for 15 tasks where the output is no terminal."""
    file = file or sys.stdout
    # Names and texts are printed as they are: what rich would take for its markup is a part of them.
    return Console(file=file, highlight=False, markup=False, emoji=False, width=None if file.isatty() else 140)


class TrainingProgress:
    """Progress over the steps of one task. A context manager.

    On a terminal it is a bar that stays in place; elsewhere a line every ten seconds, and one at the end.

    Args:
        console: from make_console.
        description: shown in front, such as "task 2/6 city_country".
        total_steps: optimizer steps of the task.
        first_step: steps done before, where a run was resumed; they count as done but not for the speed.
        clock: seconds, increasing.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        total_steps: int,
        *,
        first_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console, self._description, self._total = console, description, total_steps
        self._first_step, self._step, self._tokens = first_step, first_step, 0
        self._loss: float | None = None
        self._clock = clock
        self._start = self._last_line = clock()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}", markup=False),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._row = self._bar.add_task(description, total=total_steps, completed=first_step, figures="")

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._print_line()

    def update(self, step: int, *, tokens: int, loss: float | None = None) -> None:
        """Tells that `step` steps are done.

        Args:
            step: optimizer steps of the task so far.
            tokens: tokens of the steps since the last call.
            loss: a loss that the host already has; to fetch the newest one would make the host wait for the device.
                None keeps the one shown.
        """
        self._step = step
        self._tokens += tokens
        self._loss = self._loss if loss is None else float(loss)
        if self._bar:
            self._bar.update(self._row, completed=step, figures=self.figures())
        elif self._clock() - self._last_line >= _LINE_EVERY_SECONDS:
            self._print_line()

    def figures(self) -> str:
        """Loss, tokens per second and remaining time, as shown."""
        elapsed = self._clock() - self._start
        done = self._step - self._first_step
        parts = [] if self._loss is None else [f"loss {self._loss:.3f}"]
        if elapsed > 0 and done > 0:
            parts.append(f"{self._tokens / elapsed:,.0f} tokens/s")
            parts.append(f"{format_duration(elapsed / done * (self._total - self._step))} left")
        return "  ".join(parts)

    def _print_line(self) -> None:
        self._last_line = self._clock()
        self._console.print(Text(f"{self._description}  step {self._step}/{self._total}  {self.figures()}".rstrip()))


def format_duration(seconds: float) -> str:
    """12 -> "0:12", 4000 -> "1:06:40"."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_score(value: float | None, decimals: int = 1) -> str:
    """A score as shown in tables; "–" where there is none."""
    return "–" if value is None or np.isnan(value) else f"{value:.{decimals}f}"


def _table_width(num_tasks: int, *, decimals: int) -> int:
    """Columns that a score table takes at least: the edges, a short name, and for each score its gap and digits."""
    return 2 + _LEAST_NAME_WIDTH + num_tasks * (1 + 3 + 2 * decimals)


def score_table(
    matrix: np.ndarray, task_order: Sequence[str], metric_per_task: Mapping[str, str], *, title: str, width: int
) -> Table:
    """The score matrix [T, T]: a row for each task trained so far, a column for each task tested.

    Args:
        width: columns of the terminal; where they are few, scores lose their decimals and names are cut.
    """
    num_tasks = len(task_order)
    decimals = 1 if _table_width(num_tasks, decimals=1) <= width else 0
    name_width = max(_LEAST_NAME_WIDTH, width - _table_width(num_tasks, decimals=decimals) + _LEAST_NAME_WIDTH)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("after training", no_wrap=True, overflow="ellipsis", max_width=name_width)
    for number in range(1, num_tasks + 1):
        table.add_column(f"{number}", justify="right", no_wrap=True, min_width=3 + 2 * decimals)
    for index, task in enumerate(task_order):
        row = matrix[index]
        if np.isnan(row[: index + 1]).any():
            break
        cells = [Text(format_score(score, decimals) if tested <= index else "") for tested, score in enumerate(row)]
        cells[index].stylize("bold")
        table.add_row(f"{index + 1} {task}", *cells)
    tested_by: dict[str, list[str]] = {}
    for number, task in enumerate(task_order, start=1):
        tested_by.setdefault(metric_per_task[task], []).append(str(number))
    named = [
        METRIC_NAMES.get(metric, metric) + (f" of {', '.join(numbers)}" if len(tested_by) > 1 else "")
        for metric, numbers in tested_by.items()
    ]
    table.caption = f"in percent: {'; '.join(named)}"
    table.caption_justify = "left"
    return table


def closing_summary(told: Mapping[str, Any], places: Mapping[str, str | Path]) -> RenderableType:
    """The measures with their meaning, the protocol of the scores, and where everything lies.

    Args:
        told: what scores.json holds.
        places: what -> path, such as {"scores": DIR/scores.json}.
    """
    figures = Table(title="At the end of the sequence", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    figures.add_column("")
    figures.add_column("", justify="right")
    figures.add_column("")
    for name, meaning in SUMMARY_MEANINGS.items():
        score = format_score(told["summary"].get(name), 2)
        figures.add_row(name, Text(score, style="bold"), Text(meaning, style="dim"))
    figures.show_header = False
    files = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, path in places.items():
        files.add_row(what, Text(str(path), overflow="fold"))
    if told["routing"]:
        share = f"{told['routing']['accuracy']:.1%}"
        figures.add_row("routed", Text(share, style="bold"), Text("inputs to their own task's block", style="dim"))
    if told["general"]:
        lost = f"{told['general']['lost']:+.3f}"
        figures.add_row("general", Text(lost, style="bold"), Text("loss on a general text, ↓ is better", style="dim"))
    settings = ", ".join(f"{name}={value}" for name, value in told["protocol"].items())
    return Group(figures, Text(f"protocol: {settings}\n", style="dim"), files)


def compare_runs(names: Sequence[str], runs: Sequence[Mapping[str, Any]], *, width: int) -> Group:
    """Runs in the same format: score matrices, each task when learned and at the end, and the table of all of them.

    Args:
        names: what to call them.
        runs: from scores.read_scores. They must have the same task order.
        width: columns of the terminal; two matrices stand side by side where there is room.

    Raises:
        ValueError: runs have different task orders.
    """
    for name, run in zip(names, runs, strict=True):
        if list(run["task_order"]) != list(runs[0]["task_order"]):
            raise ValueError(
                "the runs have different task orders, so their scores cannot stand side by side:\n"
                f"  {names[0]}: {', '.join(runs[0]['task_order'])}\n  {name}: {', '.join(run['task_order'])}"
            )
    half = width // 2 - 2
    room_for_two = _table_width(len(runs[0]["task_order"]), decimals=1) <= half
    matrices = [
        score_table(
            run["matrix"], run["task_order"], run["metric_per_task"], title=name, width=half if room_for_two else width
        )
        for name, run in zip(names, runs, strict=True)
    ]
    pieces: list[RenderableType] = [Columns(matrices, padding=(0, 2)) if room_for_two else Group(*matrices)]
    differences = _differences(runs)
    if differences:
        warning = "These runs do not measure the same: " + "; ".join(differences)
        pieces.insert(0, Text(warning, style="yellow"))
    table = comparison.as_table(comparison.rows_of_runs(names, runs), "At the end of the sequence")
    labels = [f"{name}: {one_line(run.get('labels', {}))}" for name, run in zip(names, runs, strict=True)]
    return Group(*pieces, _task_comparison(names, runs), table, Text("\n".join(labels), style="dim"))


def _differences(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for field in ("protocol", "seeds", "metric_per_task"):
        for key in sorted({key for run in runs for key in run[field]}):
            # A method's own settings say nothing of runs of another one.
            own = [run for run in runs if key.startswith(f"{run['method']}.")]
            values = [str(run[field].get(key)) for run in own or runs]
            if len(set(values)) > 1:
                found.append(f"{field}.{key} is {' and '.join(dict.fromkeys(values))}")
    return found


def _task_comparison(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Each task: when learned → at the end", title_justify="left", title_style="bold")
    table.box = box.SIMPLE_HEAD
    table.add_column("task", no_wrap=True, overflow="ellipsis")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for index, task in enumerate(runs[0]["task_order"]):
        cells = []
        for run in runs:
            learned, final = run["matrix"][index, index], run["matrix"][-1, index]
            cells.append(f"{format_score(learned)} → {format_score(final):>5}")
        table.add_row(f"{index + 1} {task}", *cells)
    return table
