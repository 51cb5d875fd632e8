"""One page, and figures as files, of a run, of several runs, or of a study's folder:

    python -m sapt_jax.report DIR [DIR ...] --out=report.html [--figures=DIR]

The page stands alone: one file without network, light and dark, for a phone, a screen or paper. With --figures every
figure is written too, as PDF, SVG and PNG, one column and two columns wide. A run that still trains is shown as far as
it is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sapt_jax.command_line import told_in_one_line
from sapt_jax.report.gather import group_runs, read_runs
from sapt_jax.report.page import make_page
from sapt_jax.results.figures.catalogue import OF_A_RUN, OF_SEVERAL_RUNS, Plate, draw
from sapt_jax.results.figures.comparison import Group
from sapt_jax.results.figures.style import COLUMN, TWO_COLUMNS, Drawing, save
from sapt_jax.results.record import Record

_WIDTHS = {"1col": COLUMN, "2col": TWO_COLUMNS}


def write_figures(records: Sequence[Record], folder: Path) -> int:
    """Writes the figures of runs, and of several runs side by side; gives how many files."""
    alone = len(records) == 1
    count = 0 if alone else _write(OF_SEVERAL_RUNS, group_runs(records), folder)
    for record in records:
        count += _write(OF_A_RUN, record, folder if alone else folder / record.name.replace("/", "-"))
    return count


def _write(plates: Sequence[Plate], of: Record | Sequence[Group], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for plate in plates:
        for columns, width in _WIDTHS.items():
            if isinstance(drawing := draw(plate, of, width), Drawing):
                count += len(save(drawing, folder / f"{plate.name}-{columns}"))
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns 0; ends with 2 and one line on stderr where there is no run or no place to write."""
    parser = argparse.ArgumentParser(prog="python -m sapt_jax.report", description="A page of runs of sapt_jax.")
    parser.add_argument("folders", metavar="DIR", nargs="+", help="the --workdir of a run, or a folder of such")
    parser.add_argument("--out", default="report.html", type=Path, help="the page (default: report.html)")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="write every figure as PDF, SVG and PNG here too")
    options = parser.parse_args(arguments)
    with told_in_one_line("sapt_jax.report", code=2):
        records = read_runs(options.folders)
        page = make_page(records).encode("utf-8", "replace")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(page)
        runs = "1 run" if len(records) == 1 else f"{len(records)} runs"
        print(f"{options.out}: a page of {runs}, {len(page) / 1e6:.1f} MB")
        if options.figures:
            print(f"{options.figures}: {write_figures(records, options.figures)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
