"""How figures look: sizes, colours that colour-blind readers tell apart, and the files and pages they go into.

A drawing is made for one width. Its colours are those of a white page, each from the few below, so that a dark page can
put others in their place.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Inches: one and two columns of a paper.
COLUMN, TWO_COLUMNS = 3.3, 6.9
INK, MUTED, GRID, PAPER = "#1d2733", "#5d6b7a", "#d5dbe2", "#fefefe"
# Okabe and Ito's, in an order in which neighbours differ in lightness too.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c8c8c")
MARKERS = "osD^vPX*"
# One hue from faint to full: even in lightness, the same to every reader, and it shows what lies behind it.
_FAINT = 0.05
_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    # A task may be called "$5_a_day".
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    # TrueType, whole in the file, as publishers ask.
    "pdf.fonttype": 42,
    "svg.hashsalt": "sapt_jax",
}


class NothingToDrawError(Exception):
    """The data of a figure are not there; the message says why, in a sentence."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
      figure: matplotlib's.
      alt: what it shows, in words with the main numbers.
      table: its numbers, the first row the head, or empty.
    """

    figure: "Figure"
    alt: str
    table: Sequence[Sequence[str]] = ()


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Within it, figures are made and saved."""
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # A script that the font lacks shows as boxes in PDF and PNG; in the page the reader's own font has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure of so many inches, and its axes [rows, columns], or the only one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.03)
    return figure, figure.subplots(rows, columns, **options)


def save(drawing: Drawing, stem: Path) -> list[Path]:
    """Writes stem.pdf, stem.svg and stem.png (300 dots an inch, on white), the same bytes for the same data."""
    import matplotlib

    files = []
    with house_style(), matplotlib.rc_context({"svg.fonttype": "path"}):
        for ending, options in (
            ("pdf", {"metadata": {"CreationDate": None, "Title": drawing.alt[:200]}}),
            ("svg", {"metadata": {"Date": None, "Description": drawing.alt}}),
            ("png", {"dpi": 300, "facecolor": "white", "metadata": {"Description": drawing.alt}}),
        ):
            files.append(stem.with_name(f"{stem.name}.{ending}"))
            drawing.figure.savefig(files[-1], format=ending, **options)
    return files


def image(drawing: Drawing, dpi: int = 110) -> np.ndarray:
    """The figure as pixels [H, W, 3] uint8, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawing.figure
    with house_style():
        figure.set_dpi(dpi)
        figure.set_facecolor("white")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


# --- Parts of figures -------------------------------------------------------------------------------------------------


def shorten(name: str, most: int) -> str:
    """A name of at most so many letters: its beginning and its end."""
    name = "".join(letter if letter.isprintable() else "�" for letter in " ".join(name.split()))
    if len(name) <= most:
        return name
    tail = (most - 1) // 3
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def numbered(names: Sequence[str], width: float) -> list[str]:
    """Names with their numbers from 1, short enough for an axis of a figure so wide."""
    most = 18 if width < TWO_COLUMNS else 34
    return [f"{index} {shorten(name, most)}" for index, name in enumerate(names, start=1)]


def legend(figure: "Figure", width: float) -> None:
    """One legend above all axes, each label once."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=2 if width < TWO_COLUMNS else 4)


def shades() -> "Colormap":
    """The colours of heat maps, from low to high."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("shades", [to_rgba(SERIES[0], _FAINT), to_rgba(SERIES[0], 1.0)])


def heat_map(axes: "Axes", values: np.ndarray, scale: tuple[float, float], texts: Sequence[Sequence[str]]) -> None:
    """Cells [rows, columns] in shades, with a text of at most three letters in each; NaN cells stay empty."""
    (rows, columns), (low, high) = values.shape, scale
    shown = np.ma.masked_invalid(values)
    axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        shown,
        cmap=shades(),
        vmin=low,
        vmax=high,
        edgecolors=PAPER,
        linewidth=0.4,
    )
    # Points of one cell's width.
    room = axes.figure.get_figwidth() * 0.62 / columns * 72
    size = min(6.5, room / 1.9)
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        shade = (values[row, column] - low) / ((high - low) or 1.0)
        colour = PAPER if shade > 0.8 else INK
        if text := texts[row][column]:
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(range(columns), [str(column + 1) for column in range(columns)])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def heat_height(rows: int, width: float) -> float:
    """Inches of a heat map of so many rows."""
    return 0.55 + rows * (0.17 if width < TWO_COLUMNS else 0.22)
