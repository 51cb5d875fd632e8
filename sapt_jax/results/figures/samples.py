"""The figure of pseudo-samples that the model wrote itself."""

import numpy as np

from sapt_jax.results.figures.style import (
    COLUMN,
    GRID,
    SERIES,
    TWO_COLUMNS,
    Drawing,
    NothingToDrawError,
    legend,
    new_figure,
    numbered,
)
from sapt_jax.results.record import Record, number

# What is measured of the written samples, and of as many real inputs.
_MEASURES = (
    ("distinct words", "distinct_1", "real_distinct_1"),
    ("distinct pairs", "distinct_2", "real_distinct_2"),
    ("words of an input", "words", "real_words"),
    ("attention KL, nats", "attention_kl", "real_attention_kl"),
)


def written_samples(record: Record, width: float) -> Drawing:
    """How samples that the model wrote of each task compare with its real inputs."""
    found = record.samples()
    if not found:
        raise NothingToDrawError("The model wrote no pseudo-samples (config.pseudo_samples.source is not generate).")
    tasks, columns = sorted(found), 2 if width < TWO_COLUMNS else 4
    rows = len(_MEASURES) // columns
    figure, panels = new_figure(
        width, 0.3 + rows * (0.42 + 0.15 * len(tasks)), rows, columns, sharey=True, squeeze=False
    )
    places = np.arange(len(tasks))
    for axes, (label, written, real) in zip(panels.flat, _MEASURES, strict=True):
        pair = np.array([[number(found[index].get(name)) for name in (real, written)] for index in tasks])
        axes.hlines(places, *pair.T, color=GRID, linewidth=2)
        axes.plot(pair[:, 0], places, "o", color=SERIES[1], markerfacecolor="none", clip_on=False, label="real inputs")
        axes.plot(pair[:, 1], places, "o", color=SERIES[0], clip_on=False, label="written by the model")
        axes.set(xlabel=label, ylim=(len(tasks) - 0.5, -0.5))
        axes.set_xlim(0, 1.15 * np.nanmax(np.nan_to_num(pair), initial=0.01))
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=4)
    for axes in panels[:, 0]:
        names = numbered(record.tasks, COLUMN)
        axes.set_yticks(places, [names[index] for index in tasks])
    legend(figure, width)
    copies = [number(quality.get("copies")) for quality in found.values()]
    rejected = sum(sum(quality.get("rejected", {}).values()) for quality in found.values())
    alt = (
        f"Written samples of {len(tasks)} tasks beside real inputs; {np.nanmean(copies):.0%} are copies of training "
        f"inputs on average, and {rejected} texts were rejected."
    )
    names = ["wanted", "copies", "distinct_1", "real_distinct_1", "distinct_2", "real_distinct_2"]
    names += ["words", "real_words", "attention_kl", "real_attention_kl"]
    table = [[f"{i + 1} {record.tasks[i]}", *(f"{number(found[i].get(name)):.3g}" for name in names)] for i in tasks]
    return Drawing(figure, alt, [["task", *(name.replace("_", " ") for name in names)], *table])
