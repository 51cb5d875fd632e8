"""All figures, in the order in which a page shows them, and what draws them of the data that there are."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sapt_jax.results.figures import attention, comparison, samples, scores, training
from sapt_jax.results.figures.style import COLUMN, Drawing, NothingToDrawError, house_style
from sapt_jax.results.record import Record


@dataclasses.dataclass(frozen=True)
class Plate:
    """A figure of the catalogue.

    Attributes:
      name: of its files and TensorBoard tag.
      title: above it.
      draw: (what it is of, width in inches) -> Drawing; its docstring says what is seen.
    """

    name: str
    title: str
    draw: Callable[[Any, float], Drawing]

    @property
    def caption(self) -> str:
        return (self.draw.__doc__ or "").split("\n\n")[0].strip()


OF_A_RUN = (
    Plate("score_matrix", "Score matrix", scores.score_matrix),
    Plate("average_so_far", "Average so far", scores.average_so_far),
    Plate("scores_over_time", "Each task over time", scores.scores_over_time),
    Plate("lost", "What each task lost", scores.lost),
    Plate("transfer", "Transfer against training alone", scores.transfer),
    Plate("categories", "By category", scores.categories),
    Plate("unseen", "Tasks never trained on", scores.unseen),
    Plate("attention_in_training", "Attention in training", attention.attention_in_training),
    Plate("attention_at_test", "Attention at test", attention.attention_at_test),
    Plate("attention_by_row", "Attention, input by input", attention.attention_by_row),
    Plate("attention_over_steps", "Attention over the steps", attention.attention_over_steps),
    Plate("loss", "Training loss", training.loss),
    Plate("reflection_loss", "Reflection loss by task", training.reflection_loss),
    Plate("gradient_norm", "Gradient norm", training.gradient_norm),
    Plate("dev_score", "Score on dev", training.dev_score),
    Plate("speed", "Tokens per second", training.speed),
    Plate("written_samples", "Pseudo-samples written by the model", samples.written_samples),
)
OF_SEVERAL_RUNS = (
    Plate("summary", "At the end of the sequence", comparison.summary_bars),
    Plate("averages_so_far", "Average so far", comparison.averages_so_far),
    Plate("final_scores", "Every task at the end", comparison.final_scores),
    Plate("cost", "Cost against average performance", comparison.cost),
    Plate("models", "Model sizes and architectures", comparison.models),
)


def draw(plate: Plate, of: Record | Sequence[comparison.Group], width: float = COLUMN) -> Drawing | str:
    """A figure, or the sentence that says why there is none."""
    with house_style():
        try:
            return plate.draw(of, width)
        except NothingToDrawError as reason:
            return str(reason)


def figures_of(record: Record, width: float = COLUMN) -> Iterator[tuple[str, Drawing]]:
    """Name and drawing of every figure of a run that there are data for, `width` inches wide."""
    for plate in OF_A_RUN:
        if isinstance(drawing := draw(plate, record, width), Drawing):
            yield plate.name, drawing
