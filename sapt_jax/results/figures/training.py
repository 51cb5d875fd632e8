"""Figures of training: what was logged over the steps of all tasks, one after the other."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sapt_jax.results.figures.style import (
    GRID,
    MUTED,
    SERIES,
    TWO_COLUMNS,
    Drawing,
    NothingToDrawError,
    legend,
    new_figure,
    shades,
)
from sapt_jax.results.record import Record, number, padded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points of a curve, at most; a longer one is drawn as means of so many parts.
_POINTS = 300


@dataclasses.dataclass(frozen=True)
class Stage:
    """What was logged of one task.

    Attributes:
      task_index: counted from 0.
      before: steps of the tasks before it.
      steps: [N] within the task.
      values: [N] what was logged, numbers or lists.
    """

    task_index: int
    before: int
    steps: np.ndarray
    values: Sequence[Any]

    def numbers(self) -> np.ndarray:
        """[N], NaN for what is none."""
        return np.array([number(value) for value in self.values])

    def padded(self, length: int) -> np.ndarray:
        """[N, length] of values that are lists, NaN for what is missing."""
        return np.array([padded(value if isinstance(value, list) else (), length) for value in self.values])


def widest(found: Sequence[Stage]) -> int:
    """The length of the longest list that was logged."""
    lists = [value for stage in found for value in stage.values if isinstance(value, list)]
    return max(map(len, lists), default=0)


def stages(record: Record, name: str, kind: str = "train") -> list[Stage]:
    """What was logged under a name, task by task; tasks without it are left out."""
    found, before = [], 0
    for index in range(len(record.tasks)):
        rows = [row for row in record.logged(kind, index) if name in row]
        if rows:
            found.append(Stage(index, before, np.array([row["step"] for row in rows]), [row[name] for row in rows]))
        before += max((row["step"] for row in record.logged("train", index)), default=0)
    return found


def loss(record: Record, width: float) -> Drawing:
    """The loss of training, and the part of it that the task's answers are."""
    return _curves(record, width, {"loss": "loss", "task_loss": "of it the task"}, "loss, nats")


def gradient_norm(record: Record, width: float) -> Drawing:
    """The gradient's norm before it was clipped."""
    return _curves(record, width, {"grad_norm": "gradient norm"}, "gradient norm")


def dev_score(record: Record, width: float) -> Drawing:
    """The score on each task's own dev split while it trains."""
    found = stages(record, "score", "dev")
    if not found:
        raise NothingToDrawError("Nothing was evaluated on dev.")
    figure, axes = new_figure(width, 1.6)
    for stage in found:
        axes.plot(stage.before + stage.steps, stage.numbers(), color=SERIES[0], marker="o", clip_on=False)
    axes.set(ylim=(-4, 104), ylabel="score on dev")
    _boundaries(axes, found)
    best = [np.nanmax(stage.numbers()) for stage in found if np.isfinite(stage.numbers()).any()]
    alt = f"Score on dev over the steps of {len(found)} tasks" + (
        f"; the best of each is {np.mean(best):.1f} on average." if best else "."
    )
    rows = [
        [f"{stage.task_index + 1} {record.tasks[stage.task_index]}", f"{step}", f"{score:.1f}"]
        for stage in found
        for step, score in zip(stage.steps, stage.numbers(), strict=True)
    ]
    return Drawing(figure, alt, [["task", "step", "score"], *rows] if len(rows) <= 60 else ())


def reflection_loss(record: Record, width: float) -> Drawing:
    """How far the attention of pseudo-samples of each earlier task is from what it was, over the steps."""
    found = [stage for stage in stages(record, "reflection_by_task") if stage.task_index > 0]
    slots = widest(found)
    if not found or slots < 2:
        raise NothingToDrawError("No reflection loss was logged: the method has none, or one task was trained.")
    highest = max(float(np.nanmax(np.nan_to_num(stage.padded(slots)))) for stage in found)
    figure, axes = new_figure(width, 0.75 + slots * (0.1 if width < TWO_COLUMNS else 0.12))
    drawn = draw_stages(axes, found, slots, highest or 1.0)
    axes.set_ylabel("earlier task")
    figure.colorbar(drawn, ax=axes, label="KL, nats", pad=0.02, aspect=12)
    alt = f"Reflection loss of each earlier task over the steps of {len(found)} tasks, at most {highest:.3g} nats."
    return Drawing(figure, alt)


def speed(record: Record, width: float) -> Drawing:
    """Trained tokens, without padding, for every second that a task took, with compilation and tests on dev."""
    found = stages(record, "tokens")
    tokens = np.full(len(record.tasks), math.nan)
    for stage in found:
        # What is logged is the mean over the steps of an interval.
        tokens[stage.task_index] = np.sum(stage.numbers() * np.diff(stage.steps, prepend=0))
    rates = tokens / np.where(record.seconds > 0, record.seconds, math.nan)
    if not np.isfinite(rates).any():
        raise NothingToDrawError("The run does not tell how many seconds its tasks took.")
    figure, axes = new_figure(width, 1.5)
    axes.bar(np.arange(len(rates)) + 1, np.nan_to_num(rates), color=SERIES[0], width=0.66)
    axes.set(xlabel="task", ylabel="tokens per second", xlim=(0.3, len(rates) + 0.7))
    axes.set_xticks(range(1, len(rates) + 1, -(-len(rates) // 15)))
    axes.grid(axis="y")
    alt = f"Tokens per second of {np.isfinite(rates).sum()} tasks, {np.nanmean(rates):,.0f} on average."
    rows = [
        [
            f"{index + 1} {name}",
            *("–" if math.isnan(x) else f"{x:,.0f}" for x in (tokens[index], record.seconds[index], rates[index])),
        ]
        for index, name in enumerate(record.tasks)
    ]
    return Drawing(figure, alt, [["task", "tokens", "seconds", "tokens per second"], *rows])


def draw_stages(axes: "Axes", found: Sequence[Stage], rows: int, highest: float) -> Any:
    """Lists over steps as an image, a row for each entry; gives what a colour bar needs."""
    drawn = None
    for stage in found:
        values = _means(stage.padded(rows), max(_POINTS // len(found), 4))
        extent = (stage.before, stage.before + int(stage.steps[-1]), rows + 0.5, 0.5)
        drawn = axes.imshow(
            values.T, aspect="auto", interpolation="none", cmap=shades(), vmin=0, vmax=highest, extent=extent
        )
    _boundaries(axes, found)
    axes.set_ylim(rows + 0.5, 0.5)
    axes.set_yticks(sorted({1, *range(5, rows + 1, 5), rows} if rows > 6 else range(1, rows + 1)))
    return drawn


def _curves(record: Record, width: float, names: dict[str, str], label: str) -> Drawing:
    lines = {text: found for name, text in names.items() if (found := stages(record, name))}
    if not lines:
        raise NothingToDrawError(f"The curves hold no {label.split(',')[0]}.")
    figure, axes = new_figure(width, 1.6)
    every = np.concatenate([stage.numbers() for found in lines.values() for stage in found])
    every = every[np.isfinite(every)]
    if not every.size:
        raise NothingToDrawError(f"Of {label.split(',')[0]}, no logged value is a number.")
    for place, (text, found) in enumerate(lines.items()):
        for stage in found:
            parts = max(_POINTS // len(found), 4)
            x, y = _means(stage.before + stage.steps, parts), _means(stage.numbers(), parts)
            style = {"color": SERIES[place], "linestyle": ("-", (0, (2, 1)))[place % 2]}
            # One point makes no line.
            axes.plot(x, y, marker="." if len(x) == 1 else None, label=text if stage is found[0] else None, **style)
    if every.min() > 0 and every.max() > 20 * every.min():
        axes.set_yscale("log")
        # Powers of ten need mathematical text, which names must not be taken for.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_ylabel(label)
    _boundaries(axes, next(iter(lines.values())))
    if len(lines) > 1:
        legend(figure, width)
    text, found = next(iter(lines.items()))
    ends = [stage.numbers()[-1] for stage in found]
    mean = np.nanmean(ends) if np.isfinite(ends).any() else math.nan
    missing = sum(int(np.isnan(stage.numbers()).sum()) for stage in found)
    name = text[:1].upper() + text[1:]
    alt = f"{name} over the steps of {len(found)} tasks; at the end of a task {mean:.3g} on average."
    return Drawing(figure, alt + (f" {missing} logged values are no numbers." if missing else ""))


def _boundaries(axes: "Axes", found: Sequence[Stage]) -> None:
    """Marks where tasks begin, with their numbers."""
    ends = [stage.before + int(stage.steps[-1]) for stage in found]
    every = -(-len(found) // 16)
    for place, stage in enumerate(found):
        axes.axvline(stage.before, color=GRID, linewidth=0.6, zorder=3)
        if place % every == 0:
            axes.annotate(
                str(stage.task_index + 1),
                ((stage.before + ends[place]) / 2, 1.0),
                (0, 1.5),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=5.5,
                color=MUTED,
            )
    axes.set_xlim(found[0].before, max(ends) if max(ends) > found[0].before else found[0].before + 1)
    axes.set_xlabel("steps, task after task")


def _means(values: np.ndarray, parts: int) -> np.ndarray:
    """[N, ...] as [at most `parts`, ...]: means of neighbours."""
    if len(values) <= parts:
        return np.asarray(values, np.float64)
    return np.array([np.mean(part, axis=0) for part in np.array_split(values, parts)])
