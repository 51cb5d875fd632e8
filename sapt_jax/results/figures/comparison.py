"""Figures of several runs: methods side by side, what they cost, sizes and kinds of model (SAPT, Figures 4 and 5)."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from sapt_jax.results import metrics
from sapt_jax.results.figures.style import (
    MARKERS,
    MUTED,
    SERIES,
    TWO_COLUMNS,
    Drawing,
    NothingToDrawError,
    heat_height,
    heat_map,
    legend,
    new_figure,
    numbered,
    shorten,
)
from sapt_jax.results.record import Record, number

MEASURES = ("AP", "F.Ra", "FWT", "BWT")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      label: what they are called.
      method: without its model.
      model: the name of the base model.
      records: one for each seed.
    """

    label: str
    method: str
    model: str
    records: tuple[Record, ...]

    def values(self, of: Callable[[Record], float]) -> np.ndarray:
        """Of every run that has it."""
        found = np.array([of(record) for record in self.records], np.float64)
        return found[np.isfinite(found)]

    def mean(self, of: Callable[[Record], float]) -> float:
        found = self.values(of)
        return float(found.mean()) if found.size else math.nan

    def deviation(self, of: Callable[[Record], float]) -> float:
        """Standard deviation over seeds, with n - 1; NaN for fewer than two runs."""
        found = self.values(of)
        return float(found.std(ddof=1)) if found.size > 1 else math.nan


def measure(name: str) -> Callable[[Record], float]:
    """What reads a summary's measure of a run; NaN where it is not at its end or the measure is not defined."""

    def read(record: Record) -> float:
        if not record.tasks or record.finished < len(record.tasks):
            return math.nan
        return number((record.scores.get("summary") or {}).get(name))

    return read


def seconds(record: Record) -> float:
    """Of all tasks together; NaN where a task's are not known."""
    return float(record.seconds.sum()) if record.tasks else math.nan


def kept_bytes(record: Record) -> float:
    """Kept from task to task beside the base model."""
    return number(record.labels.get("bytes"))


def summary_bars(groups: Sequence[Group], width: float) -> Drawing:
    """AP, F.Ra, FWT and BWT of every group, with the deviation over seeds."""
    names = [name for name in MEASURES if any(group.values(measure(name)).size for group in groups)]
    if not names:
        raise NothingToDrawError("None of the runs is at its end.")
    count = len(groups)
    columns = min(len(names), 2 if width < TWO_COLUMNS else 4)
    rows = -(-len(names) // columns)
    figure, panels = new_figure(width, rows * (0.42 + 0.19 * count), rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for name, axes in zip(names, panels.flat, strict=False):
        means = [group.mean(measure(name)) for group in groups]
        spread = np.nan_to_num([group.deviation(measure(name)) for group in groups])
        colours = [SERIES[place % len(SERIES)] for place in range(count)]
        bars = {"ecolor": MUTED, "error_kw": {"elinewidth": 0.8}, "capsize": 1.5}
        axes.barh(range(count), np.nan_to_num(means), xerr=spread, color=colours, height=0.66, **bars)
        for place, (mean, deviation) in enumerate(zip(means, spread, strict=True)):
            text = "–" if math.isnan(mean) else f"{mean:.1f}"
            at = np.nan_to_num(mean)
            edge = at + deviation if at >= 0 else at - deviation
            axes.annotate(
                text,
                (edge, place),
                (3 if at >= 0 else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if at >= 0 else "right",
                fontsize=6,
            )
        axes.axvline(0, color=MUTED, linewidth=0.6)
        axes.margins(x=0.32)
        axes.locator_params(axis="x", nbins=4)
        axes.set(ylim=(count - 0.5, -0.5), xlabel=f"{name} {'↓' if name == 'F.Ra' else '↑'}")
        axes.grid(axis="x")
    for axes in panels[:, 0]:
        axes.set_yticks(range(count), [shorten(group.label, 18 if width < TWO_COLUMNS else 30) for group in groups])
    return Drawing(figure, _ranking(groups), _summary_table(groups, names))


def averages_so_far(groups: Sequence[Group], width: float) -> Drawing:
    """The mean score over the tasks so far, after each task, of every group; bands are deviations over seeds."""
    figure, axes = new_figure(width, 1.9 + 0.13 * (len(groups) // (2 if width < TWO_COLUMNS else 4)))
    longest, ends = 0, []
    for place, group in enumerate(groups):
        curves = [_seen(record) for record in group.records if record.finished]
        if not curves:
            continue
        count = min(map(len, curves))
        longest = max(longest, count)
        values, after = np.array([curve[:count] for curve in curves]), np.arange(count) + 1
        mean, colour = values.mean(axis=0), SERIES[place % len(SERIES)]
        style = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "linestyle": ("-", (0, (3, 1)))[place % 2]}
        axes.plot(after, mean, label=shorten(group.label, 24), **style)
        if len(curves) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(after, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        ends.append(f"{group.label} {mean[-1]:.1f}")
    if not ends:
        raise NothingToDrawError("No run has finished a task.")
    axes.set(ylim=(-4, 104), xlim=(0.5, longest + 0.5), xlabel="tasks trained", ylabel="mean score so far")
    axes.set_xticks(range(1, longest + 1, -(-longest // 8)))
    axes.grid(axis="y")
    legend(figure, width)
    return Drawing(figure, "Mean score over the tasks so far; at the end: " + ", ".join(ends) + ".")


def final_scores(groups: Sequence[Group], width: float) -> Drawing:
    """The score on every task after the last, of every group."""
    whole = [group for group in groups if any(record.finished == len(record.tasks) > 0 for record in group.records)]
    if not whole:
        raise NothingToDrawError("None of the runs is at its end.")
    tasks = list(dict.fromkeys(task for group in whole for record in group.records for task in record.tasks))
    values = np.full((len(tasks), len(whole)), np.nan)
    for column, group in enumerate(whole):
        for row, task in enumerate(tasks):
            values[row, column] = group.mean(lambda record, task=task: _final(record, task))
    if len(tasks) < 2:
        raise NothingToDrawError("The runs have one task: its score is the AP above.")
    texts = [["" if math.isnan(value) else f"{value:.0f}" for value in row] for row in values]
    figure, axes = new_figure(width, heat_height(len(tasks), width) + 0.5)
    heat_map(axes, values, (0.0, 100.0), texts)
    most = 12 if width < TWO_COLUMNS else 20
    axes.set_xticks(
        range(len(whole)),
        [shorten(group.label, most) for group in whole],
        rotation=30,
        ha="left",
        rotation_mode="anchor",
    )
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(tasks)), numbered(tasks, width))
    table = [
        [task, *("–" if math.isnan(x) else f"{x:.1f}" for x in row)] for task, row in zip(tasks, values, strict=True)
    ]
    return Drawing(
        figure,
        f"Scores on {len(tasks)} tasks after the last one, of {len(whole)} kinds of run.",
        [["task", *(group.label for group in whole)], *table],
    )


def cost(groups: Sequence[Group], width: float) -> Drawing:
    """AP against the seconds that training took, and against the bytes kept from task to task."""
    axes_of = (("seconds of training", seconds), ("bytes kept", kept_bytes))
    known = [
        (label, of)
        for label, of in axes_of
        if any(group.values(of).size and group.values(measure("AP")).size for group in groups)
    ]
    if not known:
        raise NothingToDrawError("No finished run tells seconds or kept bytes.")
    from matplotlib.ticker import EngFormatter

    figure, panels = new_figure(width, 2.0, 1, len(known), sharey=True, squeeze=False)
    for (label, of), axes in zip(known, panels[0], strict=True):
        for place, group in enumerate(groups):
            x, y = group.mean(of), group.mean(measure("AP"))
            if math.isfinite(x) and math.isfinite(y):
                style = {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)]}
                axes.plot([x], [y], linestyle="none", markersize=5, label=shorten(group.label, 24), **style)
        found = [group.mean(of) for group in groups if math.isfinite(group.mean(of))]
        if min(found) > 0 and max(found) > 20 * min(found):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel(label)
        axes.grid()
    panels[0, 0].set_ylabel("AP")
    legend(figure, width)
    table = [
        [
            group.label,
            _short(group.mean(measure("AP")), ".1f"),
            _short(group.mean(seconds), ",.0f"),
            _short(group.mean(kept_bytes), ",.0f"),
        ]
        for group in groups
    ]
    return Drawing(figure, "AP against cost. " + _ranking(groups), [["runs", "AP", "seconds", "kept bytes"], *table])


def models(groups: Sequence[Group], width: float) -> Drawing:
    """AP and F.Ra of every method over models: sizes of one family in turn, families side by side."""
    names = sorted({group.model for group in groups}, key=_by_family_and_size)
    if len(names) < 2:
        raise NothingToDrawError("All runs have the same base model.")
    shown = [name for name in ("AP", "F.Ra", "FWT") if any(group.values(measure(name)).size for group in groups)]
    if not shown:
        raise NothingToDrawError("None of the runs is at its end.")
    methods = list(dict.fromkeys(group.method for group in groups))
    columns = 1 if width < TWO_COLUMNS else len(shown)
    rows = -(-len(shown) // columns)
    figure, panels = new_figure(width, 0.4 + 1.6 * rows, rows, columns, squeeze=False)
    for name, axes in zip(shown, panels.flat, strict=True):
        for place, method in enumerate(methods):
            own = {group.model: group for group in groups if group.method == method}
            style = {"color": SERIES[place % len(SERIES)], "marker": MARKERS[place % len(MARKERS)]}
            for part in _families(names):
                at = [index for index in part if names[index] in own]
                means = [own[names[index]].mean(measure(name)) for index in at]
                spread = np.nan_to_num([own[names[index]].deviation(measure(name)) for index in at])
                if not at:
                    continue
                axes.errorbar(at, means, yerr=spread, capsize=1.5, elinewidth=0.7, **style)
            axes.plot([], [], label=shorten(method, 24), **style)
        axes.set_xticks(
            range(len(names)), [shorten(model, 16) for model in names], rotation=20, ha="right", rotation_mode="anchor"
        )
        axes.set(xlim=(-0.4, len(names) - 0.6), ylabel=name)
        axes.grid(axis="y")
    legend(figure, width)
    table = [
        [group.method, group.model, *(_short(group.mean(measure(name)), ".1f") for name in shown)] for group in groups
    ]
    alt = f"{', '.join(shown)} of {len(methods)} methods on {len(names)} base models: {', '.join(names)}. "
    return Drawing(figure, alt + _ranking(groups), [["method", "model", *shown], *table])


def _families(names: Sequence[str]) -> list[list[int]]:
    """Places of names by family, which lie side by side."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(_by_family_and_size(name)[0], []).append(place)
    return list(found.values())


# Of T5, in millions of parameters, as their papers count.
_SIZES = {"tiny": 0.1, "small": 60, "base": 220, "large": 770, "xl": 3000, "xxl": 11000}


def _by_family_and_size(name: str) -> tuple[str, float, str]:
    """A model's family and size as its name tells them: "t5-v1_1-xl", "llama-2-7b", "SmolLM2-135M"."""
    lower = name.lower()
    if found := re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z])", lower):
        size, rest = float(found[1]) * (1000 if found[2] == "b" else 1), lower.replace(found[0], "")
    else:
        words = [word for word in re.split(r"[^a-z0-9]+", lower) if word in _SIZES]
        size, rest = (_SIZES[words[-1]], lower.replace(words[-1], "")) if words else (0.0, lower)
    return re.sub(r"[^a-z0-9]+$", "", rest), size, name


def _ranking(groups: Sequence[Group]) -> str:
    """The groups by AP, in a sentence."""
    read = measure("AP")
    known = sorted(((group.mean(read), group.label) for group in groups if group.values(read).size), reverse=True)
    return (
        "AP: " + ", ".join(f"{label} {mean:.1f}" for mean, label in known) + "." if known else "No run is at its end."
    )


def _summary_table(groups: Sequence[Group], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for group in groups:
        cells = []
        for name in names:
            mean, deviation = group.mean(measure(name)), group.deviation(measure(name))
            cells.append(_short(mean, ".1f") + ("" if math.isnan(deviation) else f" ± {deviation:.1f}"))
        rows.append([group.label, str(len(group.records)), *cells])
    return [["runs", "seeds", *names], *rows]


def _seen(record: Record) -> np.ndarray:
    return np.array(metrics.seen_averages(metrics.finished_part(record.matrix)))


def _final(record: Record, task: str) -> float:
    whole = record.finished == len(record.tasks) and task in record.tasks
    return float(record.matrix[-1, record.tasks.index(task)]) if whole else math.nan


def _short(value: float, how: str) -> str:
    return "–" if math.isnan(value) else format(value, how)
