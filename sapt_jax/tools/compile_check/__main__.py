"""Says whether a run fits on hardware that is not here, and how fast it could be: XLA compiles for it ahead of time.

    python -m sapt_jax.tools.compile_check --config=configs/t5_xxl_superni.py --topology=v5p:2x2x2

The run's own programs are compiled at the config's longest inputs: train step, the method's penalty alone, attention
and decoding. No weights or data are read.
TPUs need jax[tpu], GPUs (--topology=h100:8) jax[cuda12]; neither needs the device. Ends with an error where a program
does not fit. With --all, a summary of the paper's configs, or of those that are named after it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from sapt_jax import sharding
from sapt_jax.command_line import load_config, parse_flags, told_in_one_line
from sapt_jax.config import check_config
from sapt_jax.tools.compile_check import report
from sapt_jax.tools.compile_check.programs import programs_of
from sapt_jax.tools.compile_check.topologies import Topology, make_topology

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's settings, a file of configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Devices: v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8, a100:8.")
_ALL = flags.DEFINE_bool("all", False, "A Markdown table of the paper's configs on the topologies one would rent.")

# LLaMA's Long Sequence configs differ from these in a constant of the loss, which changes no figure.
CONFIGS = (
    "configs/t5_large_superni.py",
    "configs/t5_large_long.py",
    "configs/t5_xl_superni.py",
    "configs/t5_xl_long.py",
    "configs/t5_xxl_superni.py",
    "configs/t5_xxl_long.py",
    "configs/llama2_7b_superni.py",
    "configs/llama2_13b_superni.py",
)
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x2", "v6e:2x4", "h100:8")
ONE_DEVICE = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1")
SUMMARY = ("config", "topology", "mesh (data x fsdp x tensor)", "train", "decode", "step", "MFU", "fits")


def describe(config: Any, title: str, topology: Topology, console: Console) -> bool:
    """Prints the report of one config and returns whether all of it fits."""
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    results = [report.check(program, mesh, topology) for program in programs_of(config, mesh)]
    heading = f"{title} on {topology.name}: {len(topology.devices)} x {topology.device.name}, {sizes}"
    console.print(report.table(heading, results, topology))
    for result in results:
        if advice := report.suggestion(result, config, mesh, topology):
            why = f" ({result.refusal})" if result.refusal else ""
            console.print(f"{result.program.name} does not fit{why}: {advice}.", style="red")
    return all(result.fits(topology) for result in results)


def summary_row(config: Any, name: str, topology: Topology) -> str:
    """A row of the summary: memory of train and decode step, and the train step's time and utilisation."""
    mesh = sharding.make_mesh(config.mesh, topology.devices)
    wanted = [program for program in programs_of(config, mesh) if program.name in ("train", "decode")]
    train, decode = (report.check(program, mesh, topology) for program in wanted)
    fits = train.fits(topology) and decode.fits(topology)
    cells = (
        name,
        topology.name,
        " x ".join(str(size) for size in mesh.shape.values()),
        report.share(train, topology),
        report.share(decode, topology),
        f"{1e3 * train.estimate.seconds:,.0f} ms" if train.estimate else "",
        report.utilisation(train, topology) if train.estimate else "",
        "yes" if fits else "no",
    )
    return f"| {' | '.join(cells)} |"


def summarise(files: tuple[str, ...]) -> None:
    """Prints the table row by row, as Markdown."""
    print(f"| {' | '.join(SUMMARY)} |\n|{'---|' * len(SUMMARY)}")
    for file in files:
        config = load_config(file)
        for name in ONE_DEVICE if "t5_large" in file else TOPOLOGIES:
            try:
                print(summary_row(config, Path(file).stem, make_topology(name)), flush=True)
            except ModuleNotFoundError as error:
                print(error, file=sys.stderr)


def main(argv: list[str]) -> None:
    with told_in_one_line():
        if _ALL.value:
            return summarise(tuple(argv[1:]) or CONFIGS)
        if len(argv) > 1 or _CONFIG.value is None:
            raise ValueError("name a config: --config=configs/NAME.py, and a topology: --topology=v5p:2x2x2.")
        check_config(_CONFIG.value)
        title = Path(flags.FLAGS["config"].config_filename).stem
        fits = describe(_CONFIG.value, title, make_topology(_TOPOLOGY.value), Console(width=120, highlight=False))
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
