"""Runs a study: methods x orders x seeds, each in a workdir of its own, and tells them all in one table.

    python -m sapt_jax.study --config=configs/studies/demo.py --workdir=runs/studies/demo

The same command again goes on: finished runs are skipped, and one that was stopped goes on where it was. --shard=0/4
takes every fourth run, so that four processes share a study (launch/slurm_study.sbatch); each of them writes the table
of what is finished by then:

    WORKDIR/METHOD/ORDER/seedN/     a run, as sapt_jax.main leaves it
    WORKDIR/table.{txt,md,tex,csv}  mean and standard deviation over seeds
"""

import argparse
import datetime
import gc
import io
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging
from etils import epath
from rich.console import Console

from sapt_jax import continual
from sapt_jax.command_line import load_config, told_in_one_line
from sapt_jax.data.stream import order_of
from sapt_jax.recorded_config import check_same_run
from sapt_jax.results import comparison
from sapt_jax.results.comparison import Row
from sapt_jax.results.scores import read_scores
from sapt_jax.results.terminal import format_duration, make_console
from sapt_jax.storage import preemption
from sapt_jax.storage.paths import as_path
from sapt_jax.storage.text_files import write_text_atomically
from sapt_jax.study.grid import Planned, choose, plan

ALL_ORDERS = "all orders"


def main(arguments: Sequence[str] | None = None, output: TextIO | None = None) -> int:
    """Runs what is left of a study. Returns 0, or 1 where a run failed; `preemption.EXIT_CODE` where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m sapt_jax.study", description="Methods x orders x seeds.")
    parser.add_argument("--config", required=True, help="a file of configs/studies/")
    parser.add_argument("--workdir", required=True, help="where the runs and the table go")
    parser.add_argument("--only", default="", help="runs METHOD/ORDER/seedN, patterns of a shell with commas")
    parser.add_argument("--shard", default="", help="i/n: part i of n, from 0")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    preemption.watch()
    with told_in_one_line():
        runs, workdir = plan(load_config(options.config)), as_path(options.workdir)
        chosen, console = choose(runs, options.only, options.shard), make_console(output)
        try:
            failed = run_all(chosen, workdir, console)
        except preemption.PreemptedError as place:
            print(f"stopped {place}, and saved. The same command goes on from there.", file=sys.stderr)
            return preemption.EXIT_CODE
        tell(runs, workdir, console)
    for name, message in failed.items():
        print(f"failed: {name}: {message}", file=sys.stderr)
    return 1 if failed else 0


def run_all(runs: Sequence[Planned], workdir: epath.Path, console: Console) -> dict[str, str]:
    """Runs what is not finished. Returns the messages of those that failed, by name.

    Raises:
      PreemptedError: the study was asked to stop.
    """
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for run in runs:
        folder = workdir / run.name
        try:
            if is_finished(run, folder):
                continue
            console.print(_line(run, runs, (workdir, seconds, failed)), style="bold")
            start = time.monotonic()
            continual.run(run.config, folder)
            seconds[run.name] = time.monotonic() - start
        except preemption.PreemptedError:
            raise
        except Exception as error:
            # Another run may do well where this one does not; all that is known of it is told.
            traceback.print_exc()
            failed[run.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        # Runs share no program in memory, only on disk.
        jax.clear_caches()
        gc.collect()
    return failed


def is_finished(run: Planned, folder: epath.Path) -> bool:
    """Whether a run has its last score.

    Raises:
      ValueError: the folder holds a run with other settings.
    """
    check_same_run(run.config, folder)
    try:
        scores = read_scores(folder)
    except (FileNotFoundError, ValueError):
        # The run writes it anew.
        return False
    return bool(not np.isnan(scores["matrix"][-1]).any()) and len(scores["task_order"]) == len(order_of(run.config))


def _line(
    run: Planned, runs: Sequence[Planned], so_far: tuple[epath.Path, Mapping[str, float], Mapping[str, str]]
) -> str:
    """What runs, what is done, and when all will have ended, as far as finished runs say it."""
    workdir, seconds, failed = so_far
    known = {other.name: seconds.get(other.name) or _told_seconds(other, workdir) for other in runs}
    done = [other for other in runs if known[other.name]]
    left = [other for other in runs if other not in done and other.name not in failed]
    line = f"study: {len(done)} of {len(runs)} runs done, {len(failed)} failed; now {run.name}"
    if not done:
        return line

    def mean(others: Sequence[Planned]) -> float:
        return float(np.mean([known[other.name] for other in others]))

    alike = {label: [other for other in done if other.method == label] for label in {other.method for other in left}}
    rest = sum(mean(alike[other.method] or done) for other in left)
    end = datetime.datetime.now() + datetime.timedelta(seconds=rest)
    return f"{line}; about {format_duration(rest)} left, until {end:%a %H:%M}"


def _told_seconds(run: Planned, workdir: epath.Path) -> float:
    """Seconds of a run that an earlier call finished; 0 where it is not finished."""
    if not _has_ended(run, workdir):
        return 0.0
    found = comparison.figures(read_scores(workdir / run.name), None)["seconds"]
    return 0.0 if np.isnan(found) else found


def tell(runs: Sequence[Planned], workdir: epath.Path, console: Console) -> None:
    """Prints the table of all finished runs of a study, and writes it in four formats."""
    finished = {run.name: read_scores(workdir / run.name) for run in runs if _has_ended(run, workdir)}
    rows, told = _rows(runs, finished)
    table = comparison.as_table(rows, f"{len(finished)} of {len(runs)} runs of the study")
    shown = comparison.sentence(rows, told)
    console.print(table)
    console.print(shown)
    plain = io.StringIO()
    make_console(plain).print(table, shown, sep="\n")
    if jax.process_index() == 0:
        formats = {
            "txt": plain.getvalue(),
            "md": f"{comparison.as_markdown(rows)}\n{comparison.LEGEND}\n\n{shown}\n",
            "tex": comparison.as_latex(rows),
            "csv": comparison.as_csv(rows),
        }
        for ending, text in formats.items():
            write_text_atomically(workdir / f"table.{ending}", text)
        console.print(f"table: {workdir}/table.{{{','.join(formats)}}}")


def _has_ended(run: Planned, workdir: epath.Path) -> bool:
    try:
        return is_finished(run, workdir / run.name)
    except ValueError:
        # It is told when it is to be run.
        return False


def _rows(runs: Sequence[Planned], finished: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """The table's lines, a line for each method and order and one for each method over all, and those told the task."""
    scores = list(finished.values())
    figures = {
        name: comparison.figures(found, comparison.single_scores(found, scores)) for name, found in finished.items()
    }
    groups: dict[str, list[str]] = {}
    orders = list(dict.fromkeys(run.order for run in runs))
    for order in [*orders, *([ALL_ORDERS] if len(orders) > 1 else [])]:
        for run in runs:
            if run.name in finished and order in (run.order, ALL_ORDERS):
                label = run.method if len(orders) == 1 else f"{run.method}, {order}"
                groups.setdefault(label, []).append(run.name)
    needs_id = {name for name, found in finished.items() if found["protocol"].get("needs_task_id")}
    told = [label for label, names in groups.items() if needs_id & set(names)]
    return [comparison.row(label, [figures[name] for name in names]) for label, names in groups.items()], told


if __name__ == "__main__":
    sys.exit(main())
