"""Figures of the scores of one run."""

import math
from collections.abc import Mapping

import numpy as np

from sapt_jax.results.figures.style import (
    GRID,
    INK,
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


def score_matrix(record: Record, width: float) -> Drawing:
    """The score on every task (columns) after training every task (rows)."""
    matrix, count = _scored(record), len(record.tasks)
    texts = [["" if math.isnan(value) else f"{value:.0f}" for value in row] for row in matrix]
    figure, axes = new_figure(width, heat_height(count, width))
    heat_map(axes, matrix, (0.0, 100.0), texts)
    axes.set_yticks(range(count), numbered(record.tasks, width))
    axes.set_xlabel("score on task")
    axes.set_ylabel("after training")
    last = _last_row(matrix)
    final = matrix[last, : last + 1]
    alt = (
        f"Scores after each of {last + 1} tasks. After task {last + 1} the mean over those learned is "
        f"{np.nanmean(final):.1f}, the lowest {_named(record, int(np.nanargmin(final)), np.nanmin(final))}, "
        f"the highest {_named(record, int(np.nanargmax(final)), np.nanmax(final))}."
    )
    head = ["after training", *(str(index + 1) for index in range(count))]
    rows = [[f"{index + 1} {name}", *map(_score, matrix[index])] for index, name in enumerate(record.tasks)]
    return Drawing(figure, alt, [head, *rows])


def scores_over_time(record: Record, width: float) -> Drawing:
    """Each task's score from the moment it was learned, in a panel of its own."""
    matrix, count = _scored(record), len(record.tasks)
    columns = min(count, 3 if width < TWO_COLUMNS else 5)
    rows = -(-count // columns)
    figure, panels = new_figure(width, 0.45 + 0.62 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
    most = int(width / columns * 72 / 4.7)
    for index, axes in enumerate(panels.flat):
        if index >= count:
            axes.set_visible(False)
            continue
        after = np.arange(index, count) + 1
        scores = matrix[index:, index]
        axes.axvline(index + 1, color=GRID, linewidth=3)
        axes.plot(after, scores, color=SERIES[0], marker=".", markersize=2.5)
        axes.plot(after[:1], scores[:1], color=SERIES[1], marker="D", markersize=3.5, linestyle="none")
        axes.set_title(shorten(f"{index + 1} {record.tasks[index]}", most), pad=2, fontsize=6)
        axes.set(ylim=(-8, 108), xlim=(0.5, count + 0.5), yticks=(0, 50, 100))
        axes.set_xticks(sorted({1, (count + 1) // 2, count}))
        axes.tick_params(labelsize=5.5)
        axes.grid(axis="y")
    figure.supxlabel("tasks trained", fontsize=7)
    figure.supylabel("score", fontsize=7)
    changes = [(matrix[_last_row(matrix), index] - matrix[index, index], index) for index in range(_last_row(matrix))]
    known = [(change, index) for change, index in changes if not math.isnan(change)]
    alt = f"The score of each of {count} tasks after every later task, and a diamond where it was learned."
    if known:
        change, index = min(known)
        fell = f"The largest fall since learned is {-change:.1f} points, of {record.tasks[index]}."
        alt += f" {fell if change < 0 else 'None is lower than when it was learned.'}"
    return Drawing(figure, alt)


def average_so_far(record: Record, width: float) -> Drawing:
    """The mean score over the tasks seen so far, after each task, and the new task's own score."""
    matrix, count = _scored(record), len(record.tasks)
    seen = np.array([_mean(matrix[index, : index + 1]) for index in range(count)])
    new = np.diag(matrix)
    after = np.arange(count) + 1
    figure, axes = new_figure(width, 1.7)
    axes.plot(after, new, color=SERIES[1], marker="D", linestyle="none", label="the task just learned")
    axes.plot(after, seen, color=SERIES[0], marker="o", label="mean of tasks so far (AP)")
    axes.set(ylim=(-4, 104), xlim=(0.5, count + 0.5), xlabel="tasks trained", ylabel="score")
    axes.set_xticks(_counts(count))
    axes.grid(axis="y")
    legend(figure, width)
    last = _last_row(matrix)
    alt = f"Mean score over the tasks so far: {_score(seen[0])} after the first, {_score(seen[last])} after {last + 1}."
    rows = [[str(index + 1), _score(seen[index]), _score(new[index])] for index in range(count)]
    return Drawing(figure, alt, [["tasks trained", "mean so far", "the task just learned"], *rows])


def lost(record: Record, width: float) -> Drawing:
    """Each task's best score before the last task, and its score at the end."""
    matrix = _scored(record)
    last = _last_row(matrix)
    if last == 0:
        raise NothingToDrawError("One task is finished: nothing came after it that it could be forgotten for.")
    best = np.array([np.nanmax(matrix[index:last, index]) for index in range(last)])
    final = matrix[last, :last]
    figure, axes = new_figure(width, 0.5 + 0.17 * last)
    places = np.arange(last)
    axes.hlines(places, best, final, color=MUTED, linewidth=1.4)
    axes.plot(best, places, "o", color=SERIES[1], markerfacecolor="none", label="best before")
    axes.plot(final, places, "o", color=SERIES[0], label=f"after task {last + 1}")
    for place in places:
        if math.isfinite(best[place] - final[place]):
            axes.annotate(
                f"{final[place] - best[place]:+.0f}".replace("+0", "0").replace("-0", "0"),
                (max(best[place], final[place]), place),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=INK,
            )
    axes.set(xlim=(-4, 116), ylim=(last - 0.5, -0.5), xlabel="score", xticks=(0, 25, 50, 75, 100))
    axes.set_yticks(places, numbered(record.tasks[:last], width))
    axes.grid(axis="x")
    legend(figure, width)
    falls = best - final
    worst = int(np.nanargmax(falls))
    alt = (
        f"Best score of each task before task {last + 1}, and after it. On average {np.nanmean(falls):.1f} points were "
        f"lost; most by {record.tasks[worst]}, {falls[worst]:.1f}."
    )
    rows = [
        [f"{i + 1} {record.tasks[i]}", _score(best[i]), _score(final[i]), _score(final[i] - best[i])]
        for i in range(last)
    ]
    return Drawing(figure, alt, [["task", "best before", "at the end", "change"], *rows])


def categories(record: Record, width: float) -> Drawing:
    """The mean score at the end of each category of tasks."""
    found = record.scores.get("category_scores")
    if not isinstance(found, Mapping) or not found:
        raise NothingToDrawError("The tasks have no categories: only those of SuperNI do.")
    return bars({name: number(score) for name, score in found.items()}, width, "mean score of the category")


def unseen(record: Record, width: float) -> Drawing:
    """Scores on tasks that were never trained on."""
    found = record.scores.get("unseen")
    if not isinstance(found, Mapping) or not found:
        raise NothingToDrawError("No task was tested that was never trained on (config.eval.unseen_tasks).")
    return bars({name: number(score) for name, score in found.items()}, width, "score, never trained on")


def transfer(record: Record, width: float) -> Drawing:
    """How much better each task is learned in the sequence than alone."""
    matrix, single = _scored(record), record.scores.get("single_task_scores")
    if not isinstance(single, Mapping) or not single:
        raise NothingToDrawError("There are no runs of single tasks to compare with (config.eval.single_task_runs).")
    gains = [matrix[index, index] - number(single.get(name)) for index, name in enumerate(record.tasks)]
    count = len(gains)
    figure, axes = new_figure(width, 0.5 + 0.17 * count)
    colours = [SERIES[0] if gain >= 0 else SERIES[1] for gain in gains]
    axes.barh(range(count), np.nan_to_num(gains), color=colours, height=0.62)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    reach = max([1.0, *(abs(gain) for gain in gains if math.isfinite(gain))]) * 1.35
    for place, gain in enumerate(gains):
        if math.isfinite(gain):
            beside = (3 if gain >= 0 else -3, 0)
            side = "left" if gain >= 0 else "right"
            axes.annotate(
                f"{gain:+.1f}", (gain, place), beside, textcoords="offset points", ha=side, va="center", size=6
            )
    axes.set(xlim=(-reach, reach), ylim=(count - 0.5, -0.5), xlabel="points over training alone")
    axes.set_yticks(range(count), numbered(record.tasks, width))
    axes.grid(axis="x")
    alt = (
        "Score of each task when learned, less that of a model trained on it alone; "
        f"the mean (FWT) is {_mean(gains):+.1f}."
    )
    rows = [
        [f"{i + 1} {name}", _score(matrix[i, i]), _score(number(single.get(name))), _score(gains[i])]
        for i, name in enumerate(record.tasks)
    ]
    return Drawing(figure, alt, [["task", "in the sequence", "alone", "difference"], *rows])


def bars(values: Mapping[str, float], width: float, label: str) -> Drawing:
    """Scores from 0 to 100 as bars with their names."""
    names, scores = list(values), np.array(list(values.values()))
    figure, axes = new_figure(width, 0.4 + 0.19 * len(names))
    axes.barh(range(len(names)), np.nan_to_num(scores), color=SERIES[0], height=0.62)
    for place, score in enumerate(scores):
        text, at = ("no score", 0.0) if math.isnan(score) else (f"{score:.1f}", score)
        axes.annotate(text, (at, place), (3, 0), textcoords="offset points", va="center", fontsize=6)
    axes.set(xlim=(0, 112), ylim=(len(names) - 0.5, -0.5), xlabel=label, xticks=(0, 25, 50, 75, 100))
    axes.set_yticks(range(len(names)), [shorten(name, 24 if width < TWO_COLUMNS else 44) for name in names])
    axes.grid(axis="x")
    alt = f"{label[:1].upper()}{label[1:]}: " + ", ".join(f"{name} {_score(score)}" for name, score in values.items())
    return Drawing(figure, alt + ".", [["name", label], *([name, _score(score)] for name, score in values.items())])


def _scored(record: Record) -> np.ndarray:
    if not np.isfinite(record.matrix).any():
        raise NothingToDrawError("No task is learned and tested yet.")
    return record.matrix


def _last_row(matrix: np.ndarray) -> int:
    """The last task with any score."""
    return int(np.nonzero(np.isfinite(matrix).any(axis=1))[0][-1])


def _named(record: Record, index: int, score: float) -> str:
    return f"{record.tasks[index]} with {score:.1f}"


def _score(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _mean(values) -> float:
    values = np.asarray(values, np.float64)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _counts(count: int) -> list[int]:
    """Marks on an axis of task numbers: at most about eight."""
    step = -(-count // 8)
    return list(range(1, count + 1, step))
