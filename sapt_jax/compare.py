"""Runs side by side:

    python -m sapt_jax.compare DIR1 DIR2 ...

prints the score matrices of any number of workdirs in the same format, what each task scored when it was learned and
at the end, and one table of them all.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from sapt_jax.command_line import told_in_one_line
from sapt_jax.results import terminal
from sapt_jax.results.scores import read_scores

# By config.method and config.pet.kind.
METHOD_NAMES = {
    ("sapt", "lora"): "SAPT-LoRA",
    ("sapt", "prompt"): "SAPT-Prompt",
    ("sequential", "lora"): "sequential LoRA",
    ("sequential", "prompt"): "sequential prompt",
}


def run_names(runs: Sequence[dict[str, Any]], folders: Sequence[str | Path]) -> tuple[str, ...]:
    """What to call runs: their methods where these differ, else what differs in their folders' paths."""
    kinds = [run["protocol"].get("pet.kind", "lora") for run in runs]
    methods = [METHOD_NAMES.get((run["method"], kind), run["method"]) for run, kind in zip(runs, kinds, strict=True)]
    if len(set(methods)) == len(methods):
        return tuple(methods)
    paths = [Path(folder).resolve() for folder in folders]
    common = Path(os.path.commonpath(paths))
    return tuple(str(path.relative_to(common)) if path != common else path.name for path in paths)


def main(arguments: Sequence[str] | None = None, output: TextIO | None = None) -> int:
    """Prints the comparison and returns 0; ends with 2 and one line on stderr where the runs cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m sapt_jax.compare", description="Runs of sapt_jax side by side.")
    parser.add_argument("folders", metavar="DIR", nargs="+", help="the --workdir of a run")
    folders = parser.parse_args(arguments).folders
    console = terminal.make_console(output)
    with told_in_one_line("sapt_jax.compare", code=2):
        runs = tuple(read_scores(folder) for folder in folders)
        console.print(terminal.compare_runs(run_names(runs, folders), runs, width=console.width))
    return 0


if __name__ == "__main__":
    sys.exit(main())
