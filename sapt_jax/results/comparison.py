"""One table of many runs: mean and standard deviation over seeds, as text, Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from sapt_jax.results import metrics
from sapt_jax.results.labels import format_bytes

Run = Mapping[str, Any]


class Measure(NamedTuple):
    """A column: its name in the table and in CSV, how its mean is shown, and whether a deviation is."""

    name: str
    field: str
    shown: Callable[[float], str]
    spreads: bool = True


def _one_decimal(value: float) -> str:
    return f"{value:.1f}"


MEASURES = (
    Measure("AP", "ap", _one_decimal),
    Measure("F.Ra", "f_ra", _one_decimal),
    Measure("BWT", "bwt", _one_decimal),
    Measure("FWT", "fwt", _one_decimal),
    Measure("learned", "learning_accuracy", _one_decimal),
    Measure("routed", "routing_accuracy", _one_decimal),
    Measure("seconds", "seconds", lambda value: f"{value:.0f}", spreads=False),
    Measure("kept", "kept_bytes", lambda value: format_bytes(round(value)), spreads=False),
)
LEGEND = (
    "AP: mean score at the end; F.Ra: lost from each task's best; BWT: change since learned; FWT: gained over training "
    "alone; learned: mean score of tasks just learned; routed: test inputs whose largest weight is on their own task, "
    "in percent; seconds: of training; kept: from task to task beside the model."
)


class Row(NamedTuple):
    """A line of the table: what it is called, its number of runs, and by measure (mean, sample deviation) or NaN."""

    label: str
    runs: int
    cells: Mapping[str, tuple[float, float]]


def figures(run: Run, single: Mapping[str, float] | None) -> dict[str, float]:
    """What the table tells of a run, by the measures' fields; NaN where the run does not say it.

    Args:
      run: from `scores.read_scores`.
      single: scores of models trained on each task alone, for FWT; None takes the run's own FWT, if it has one.
    """
    matrix = metrics.finished_part(run["matrix"])
    if not len(matrix):
        return {measure.field: math.nan for measure in MEASURES}
    done = run["task_order"][: len(matrix)]
    alone = [single[name] for name in done] if single and set(done) <= set(single) else None
    costs = [(run.get("costs") or {}).get(name) for name in done]
    told = metrics.summarise(matrix, alone)
    found = {
        "ap": told["AP"],
        "f_ra": told["F.Ra"],
        "bwt": told["BWT"],
        "fwt": told["FWT"] if alone else run["summary"].get("FWT"),
        "learning_accuracy": told["LA"],
        "routing_accuracy": 100 * run["routing"]["accuracy"] if run.get("routing") else None,
        "seconds": sum(c["seconds"] + c.get("writing_seconds", 0) for c in costs) if all(costs) else None,
        "kept_bytes": (run.get("labels") or {}).get("bytes"),
    }
    return {field: math.nan if value is None else float(value) for field, value in found.items()}


def row(label: str, runs: Sequence[Mapping[str, float]]) -> Row:
    """The line of runs that differ in their seed alone (or are what one wants to average), from their `figures`."""
    cells = {}
    for measure in MEASURES:
        values = np.array([run[measure.field] for run in runs], np.float64)
        # A mean over the runs that say it would be of other runs than its neighbours.
        deviation = values.std(ddof=1) if len(values) > 1 else math.nan
        cells[measure.field] = (float(values.mean()) if len(values) else math.nan, float(deviation))
    return Row(label, len(runs), cells)


def rows_of_runs(names: Sequence[str], runs: Sequence[Run]) -> list[Row]:
    """A line for each run; FWT against a single-task run among them, of the same seed and order, where there is one."""
    return [row(name, [figures(run, single_scores(run, runs))]) for name, run in zip(names, runs, strict=True)]


def single_scores(run: Run, others: Sequence[Run]) -> dict[str, float] | None:
    """Scores of each task alone, of a run of single_task with a run's order and seeds among others; None without."""
    for other in others:
        alike = list(other["task_order"]) == list(run["task_order"]) and other["seeds"] == run["seeds"]
        if other["method"] == "single_task" and alike:
            return dict(zip(other["task_order"], np.diag(other["matrix"]).tolist(), strict=True))
    return None


def cell(measure: Measure, found: Row, plus_minus: str = "±") -> str:
    """A cell's text; "-" where a run of the line does not say it."""
    mean, deviation = found.cells[measure.field]
    if math.isnan(mean):
        return "-"
    text = measure.shown(mean)
    return text if math.isnan(deviation) or not measure.spreads else f"{text} {plus_minus} {measure.shown(deviation)}"


def as_table(rows: Sequence[Row], title: str) -> Table:
    """For the terminal."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in ("runs", *(measure.name for measure in MEASURES)):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in rows:
        table.add_row(found.label, str(found.runs), *(cell(measure, found) for measure in MEASURES))
    table.caption, table.caption_justify = LEGEND, "left"
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """A table of GitHub's Markdown."""
    lines = [
        f"| | runs | {' | '.join(measure.name for measure in MEASURES)} |",
        f"|---|{'---:|' * (1 + len(MEASURES))}",
    ]
    for found in rows:
        label = found.label.replace("|", "\\|")
        lines.append(f"| {label} | {found.runs} | {' | '.join(cell(measure, found) for measure in MEASURES)} |")
    return "\n".join(lines) + "\n"


def as_latex(rows: Sequence[Row]) -> str:
    """A tabular for the package booktabs."""
    heading = " & ".join(["", "runs", *(measure.name for measure in MEASURES)])
    lines = [f"\\begin{{tabular}}{{l{'r' * (1 + len(MEASURES))}}}", "\\toprule", f"{heading} \\\\", "\\midrule"]
    for found in rows:
        cells = [cell(measure, found, "$\\pm$") for measure in MEASURES]
        lines.append(" & ".join([_escaped(found.label), str(found.runs), *cells]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Means and deviations at full precision, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = [measure.field for measure in MEASURES]
    writer.writerow(["label", "runs", *(name for field in fields for name in (field, f"{field}_sd"))])
    for found in rows:
        numbers = [number for field in fields for number in found.cells[field]]
        writer.writerow([found.label, found.runs, *("" if math.isnan(number) else repr(number) for number in numbers)])
    return out.getvalue()


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)


def sentence(rows: Sequence[Row], told: Sequence[str]) -> str:
    """What the table shows, in one sentence: the best and the worst method that are told no task, and the best bound.

    Args:
      told: labels of the lines whose methods are told the task of every input.
    """
    known = sorted((found for found in rows if not math.isnan(found.cells["ap"][0])), key=lambda r: -r.cells["ap"][0])
    free, bounds = ([found for found in known if (found.label in told) == bound] for bound in (False, True))

    def ends(found: Row) -> str:
        return f"{found.label} ends with AP {cell(MEASURES[0], found)} and has lost {cell(MEASURES[1], found)} points"

    parts = [f"{ends(free[0])} of each task's best"] if free else []
    parts += [ends(free[-1])] if len(free) > 1 else []
    parts += [f"{found.label}, told each input's task, reaches {cell(MEASURES[0], found)}" for found in bounds[:1]]
    return "; ".join(parts) + "." if parts else "No run is finished yet."
