"""Figures of how blocks were mixed: attention over the slots, in training and at test (SAPT, Figure 3)."""

import numpy as np

from sapt_jax.results.figures.style import (
    TWO_COLUMNS,
    Drawing,
    NothingToDrawError,
    heat_height,
    heat_map,
    new_figure,
    numbered,
)
from sapt_jax.results.figures.training import draw_stages, stages, widest
from sapt_jax.results.record import Record, padded

_BINS = 10


def attention_in_training(record: Record, width: float) -> Drawing:
    """Mean attention of each task's training inputs on every slot, at the end of the task."""
    rows = {}
    for index in range(len(record.tasks)):
        logged = [row["attention"] for row in record.logged("train", index) if isinstance(row.get("attention"), list)]
        if logged:
            rows[index] = logged[-1]
    if not rows:
        raise NothingToDrawError("The curves hold no attention.")
    return _map(record, width, rows, "while task")


def attention_at_test(record: Record, width: float) -> Drawing:
    """Mean attention of each task's test inputs on every slot, after the last task."""
    rows = {index: weights.mean(axis=0) for index, weights in _test_weights(record).items()}
    return _map(record, width, rows, "test inputs of")


def attention_by_row(record: Record, width: float) -> Drawing:
    """How many test inputs of each task put how much of their attention on the task's own slot."""
    found = {index: weights[:, index] for index, weights in _test_weights(record).items() if weights.shape[1] > index}
    if not found or max(w.shape[1] for w in _test_weights(record).values()) < 2:
        raise NothingToDrawError("There is one slot: no input chooses.")
    count = len(record.tasks)
    shares = np.full((count, _BINS), np.nan)
    for index, weights in found.items():
        shares[index] = np.histogram(np.clip(weights, 0, 1), bins=_BINS, range=(0, 1))[0] / len(weights)
    figure, axes = new_figure(width, heat_height(count, width))
    heat_map(axes, shares, (0.0, 1.0), [[f"{100 * share:.0f}" if share > 0 else "" for share in row] for row in shares])
    axes.set_xticks(np.arange(0, _BINS + 1, 2) - 0.5, [f"{tick:.0%}" for tick in np.arange(0, _BINS + 1, 2) / _BINS])
    axes.set_yticks(range(count), numbered(record.tasks, width))
    axes.set_xlabel("on the own slot; cells: % of inputs")
    medians = {index: float(np.median(weights)) for index, weights in found.items()}
    lowest = min(medians, key=medians.__getitem__)
    alt = (
        "Share of each task's test inputs by the attention that they put on the task's own slot. The median input has "
        f"{np.mean(list(medians.values())):.0%} on average over tasks; lowest is {record.tasks[lowest]}, "
        f"{medians[lowest]:.0%}."
    )
    head = ["task", "inputs", "lowest", "median", "highest", "on the own slot most"]
    weights_of = _test_weights(record)
    rows = [
        [
            f"{index + 1} {record.tasks[index]}",
            str(len(weights)),
            f"{weights.min():.0%}",
            f"{medians[index]:.0%}",
            f"{weights.max():.0%}",
            f"{np.mean(weights_of[index].argmax(axis=1) == index):.0%}",
        ]
        for index, weights in found.items()
    ]
    return Drawing(figure, alt, [head, *rows])


def attention_over_steps(record: Record, width: float) -> Drawing:
    """Mean attention on every slot, over the steps of all tasks one after the other."""
    found = stages(record, "attention")
    slots = widest(found)
    if not found:
        raise NothingToDrawError("The curves hold no attention.")
    if slots < 2:
        raise NothingToDrawError("There is one slot: attention has nothing to choose from.")
    figure, axes = new_figure(width, 0.75 + slots * (0.1 if width < TWO_COLUMNS else 0.12))
    drawn = draw_stages(axes, found, slots, 1.0)
    axes.set_ylabel("slot")
    figure.colorbar(drawn, ax=axes, label="attention", pad=0.02, aspect=12)
    first = [float(stage.padded(slots)[0, stage.task_index]) for stage in found if stage.task_index < slots]
    last = [float(stage.padded(slots)[-1, stage.task_index]) for stage in found if stage.task_index < slots]
    alt = (
        f"Attention on {slots} slots over the steps of {len(found)} tasks. On its own slot a task's inputs put "
        f"{np.nanmean(first):.0%} on average at the beginning of its training and {np.nanmean(last):.0%} at the end."
        if first
        else f"Attention on {slots} slots over the steps of {len(found)} tasks."
    )
    return Drawing(figure, alt)


def _test_weights(record: Record) -> dict[int, np.ndarray]:
    """By task: weights [N, S] of its test inputs after the last finished task."""
    last = record.finished - 1
    if last < 0:
        raise NothingToDrawError("No task is learned and tested yet.")
    found = {index: record.weights(last, index) for index in range(last + 1)}
    found = {index: weights for index, weights in found.items() if weights is not None}
    if not found:
        raise NothingToDrawError("The predictions hold no attention weights.")
    return found


def _map(record: Record, width: float, rows: dict[int, np.ndarray], label: str) -> Drawing:
    """Tasks x slots, in percent."""
    slots, count = max(len(row) for row in rows.values()), len(record.tasks)
    if slots < 2:
        raise NothingToDrawError("There is one slot: nothing is mixed.")
    values = np.full((count, slots), np.nan)
    for index, row in rows.items():
        values[index] = padded(list(row), slots)
    texts = [["" if np.isnan(value) or value < 0.005 else f"{100 * value:.0f}" for value in row] for row in values]
    figure, axes = new_figure(width, heat_height(count, width))
    heat_map(axes, values, (0.0, 1.0), texts)
    axes.set_yticks(range(count), numbered(record.tasks, width))
    axes.set_xlabel("attention on slot, %")
    axes.set_ylabel(label)
    own = [values[index, index] for index in rows if index < slots]
    alt = f"Attention of {len(rows)} tasks on {slots} slots. " + (
        f"On its own slot a task has {np.nanmean(own):.0%} on average, at least {np.nanmin(own):.0%}."
        if np.isfinite(own).any()
        else ""
    )
    table = [
        [f"{index + 1} {record.tasks[index]}", *("–" if np.isnan(x) else f"{x:.0%}" for x in values[index])]
        for index in sorted(rows)
    ]
    return Drawing(figure, alt.strip(), [["task", *(str(slot + 1) for slot in range(slots))], *table])
