"""One self-contained page of runs: figures, what was run, warnings, and a browser of predictions."""

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jinja2

from sapt_jax.report import told
from sapt_jax.report.browse import browser_data
from sapt_jax.report.gather import group_runs
from sapt_jax.report.inline_svg import inline_svg
from sapt_jax.results.figures.catalogue import OF_A_RUN, OF_SEVERAL_RUNS, Plate, draw
from sapt_jax.results.figures.comparison import Group
from sapt_jax.results.figures.style import Drawing
from sapt_jax.results.record import Record

# Bytes of a page: figures of runs, and answers of the browser. The rest is small.
FIGURES_BUDGET, ANSWERS_BUDGET = 1_900_000, 800_000


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure as it stands in a page."""

    key: str
    title: str
    caption: str
    svg: str
    alt: str
    table: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Chapter:
    """What a page tells of one run.

    Attributes:
      key: of its anchors.
      record: the run.
      figures: empty where they are left out.
      missing: (title, why) of figures that there are no data for.
      left_out: why figures that there are data for are not here, or "".
    """

    key: str
    record: Record
    figures: list[Figure]
    missing: list[tuple[str, str]]
    left_out: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return told.settings_of(self.record)

    @property
    def model(self) -> str:
        return told.model_name(self.settings)

    @property
    def warnings(self) -> list[str]:
        return told.warnings_of(self.record, self.settings)

    @property
    def facts(self) -> dict[str, Any]:
        """What templates tell of the run."""
        return {
            "summary": told.summary(self.record),
            "metrics": told.metric_names(self.record),
            "changed": told.changed(self.settings),
            "protocol": told.protocol(self.record),
            "labels": told.labels(self.record),
        }


def make_page(records: Sequence[Record]) -> str:
    """The page of a run, or of several side by side."""
    groups = group_runs(records)
    comparison = _figures(OF_SEVERAL_RUNS, groups, "all-") if len(records) > 1 else ([], [])
    chapters, size = [], 0
    for place, record in enumerate(_by_group(groups)):
        chapter = _chapter(record, f"run{place}-", _why_without(record, groups, size))
        size += sum(len(figure.svg) for figure in chapter.figures)
        chapters.append(chapter)
    shown = [chapter for chapter in chapters if chapter.figures]
    answers = {
        chapter.record.name: browser_data(chapter.record, ANSWERS_BUDGET // max(len(shown), 1)) for chapter in shown
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sapt_jax.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    script, _, _ = environment.loader.get_source(environment, "page.js")
    return environment.get_template("page.html").render(
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        groups=groups,
        comparison=comparison[0],
        comparison_missing=comparison[1],
        chapters=chapters,
        answers=answers,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _by_group(groups: Sequence[Group]) -> list[Record]:
    return [record for group in groups for record in group.records]


def _why_without(record: Record, groups: Sequence[Group], size: int) -> str:
    (group,) = (group for group in groups if record in group.records)
    if record is not group.records[0]:
        return f"It differs from {group.records[0].name} in its seed alone, and its figures are left out."
    if size > FIGURES_BUDGET:
        return "The page is as large as a page should be, and the figures of this run are left out."
    return ""


def _chapter(record: Record, key: str, left_out: str) -> Chapter:
    if left_out:
        return Chapter(key, record, [], [], f"{left_out} python -m sapt_jax.report {record.workdir} shows them.")
    return Chapter(key, record, *_figures(OF_A_RUN, record, key))


def _figures(
    plates: Sequence[Plate], of: Record | Sequence[Group], key: str
) -> tuple[list[Figure], list[tuple[str, str]]]:
    figures, missing = [], []
    for plate in plates:
        drawing = draw(plate, of)
        if isinstance(drawing, Drawing):
            name = f"{key}{plate.name}"
            svg = inline_svg(drawing, f"{name}-")
            figures.append(Figure(name, plate.title, plate.caption, svg, drawing.alt, drawing.table))
        else:
            missing.append((plate.title, drawing))
    return figures, missing
