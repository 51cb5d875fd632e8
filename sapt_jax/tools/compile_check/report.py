"""Compiles programs and tells what they need: one table for each config, or one row of a summary."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from sapt_jax.tools.compile_check import hlo, roofline
from sapt_jax.tools.compile_check.programs import Program
from sapt_jax.tools.compile_check.topologies import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Result:
    """What compiling a program told.

    Attributes:
      arguments, outputs, temporaries: bytes on each device; outputs less what takes a donated argument's place.
      estimate: None where the compiler refused the program.
      refusal: the compiler's words, or "".
    """

    program: Program
    arguments: int
    outputs: int
    temporaries: int
    estimate: roofline.Estimate | None
    refusal: str = ""

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries

    def fits(self, topology: Topology) -> bool:
        """Whether every device holds all of it."""
        return not self.refusal and self.total <= topology.device.memory


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check(program: Program, mesh: Mesh, topology: Topology) -> Result:
    """Lowers and compiles a program for a mesh of the topology's devices."""
    try:
        compiled = program.lower(mesh).compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Result(program, bytes_on_device(program.arguments), 0, 0, None, _first_sentence(str(error)))
    memory = compiled.memory_analysis()
    return Result(
        program,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        roofline.estimate(hlo.operations(compiled.as_text(), program.loop_trips), mesh, topology),
    )


def _first_sentence(message: str) -> str:
    return re.split(r"\.\s|\n", message.removeprefix("RESOURCE_EXHAUSTED: "))[0].rstrip(". ")


def suggestion(result: Result, config: Any, mesh: Mesh, topology: Topology) -> str:
    """What to change so that a program fits, or "" where it does."""
    if result.fits(topology):
        return ""
    sizes = dict(mesh.shape)
    spread = sizes["data"] > 1
    shards = sizes["data"] * sizes["fsdp"]
    rows = config.train.batch_size // config.train.accumulation
    if spread and result.arguments > topology.device.memory / 2:
        return "the weights take most of the memory: spread them with --config.mesh.data=1 --config.mesh.fsdp=-1"
    if result.program.name == "train" and config.model.remat != "full":
        return "recompute activations with --config.model.remat=full"
    if result.program.name == "train" and rows // 2 >= shards and rows % (2 * shards) == 0:
        return f"take fewer rows at a time with --config.train.accumulation={2 * config.train.accumulation}"
    if result.program.name == "decode" and config.eval.batch_size // 2 >= shards:
        return f"decode fewer rows at a time with --config.eval.batch_size={config.eval.batch_size // 2}"
    if spread:
        return "spread the weights with --config.mesh.data=1 --config.mesh.fsdp=-1"
    return "take a topology of more devices, or of devices with more memory"


def table(title: str, results: Sequence[Result], topology: Topology) -> Table:
    """One column for each program."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("on each device")
    for result in results:
        shown.add_column(result.program.name, justify="right")
    kinds = sorted({kind for result in results if result.estimate for kind in result.estimate.collectives})
    rows = {
        "arguments": lambda r: _size(r.arguments),
        "outputs": lambda r: "" if r.refusal else _size(r.outputs),
        "temporaries": lambda r: "" if r.refusal else _size(r.temporaries),
        "share of memory": lambda r: share(r, topology),
        "matrix FLOPs": lambda r: r.estimate and f"{r.estimate.flops / 1e12:,.3f} T",
        "kernels not counted": lambda r: r.estimate and str(r.estimate.unknown_kernels or ""),
        "memory traffic": lambda r: r.estimate and _size(r.estimate.bytes),
        **{kind: _collective_row(kind) for kind in kinds},
        "time by FLOPs": lambda r: r.estimate and _time(r.estimate.compute),
        "time by memory": lambda r: r.estimate and _time(r.estimate.memory),
        "time by network": lambda r: r.estimate and _time(r.estimate.network),
        "roofline": lambda r: r.estimate and _time(r.estimate.seconds),
        "utilisation at it": lambda r: r.estimate and utilisation(r, topology),
        "compiler's time": lambda r: r.estimate and _time(r.estimate.compiler_seconds),
    }
    for name, cell in rows.items():
        cells = [cell(result) or "" for result in results]
        if any(cells):
            shown.add_row(name, *cells)
    return shown


def share(result: Result, topology: Topology) -> str:
    """Share of a device's memory that a program takes."""
    return "does not fit" if result.refusal else f"{result.total / topology.device.memory:.0%}"


def utilisation(result: Result, topology: Topology) -> str:
    """Model-FLOPs utilisation at the roofline time, or "" where the model does not run."""
    work = result.program.model_flops
    value = result.estimate.utilisation(work, len(topology.devices), topology.device.flops)
    return f"{value:.0%}" if work else ""


def _collective_row(kind: str) -> Any:
    def cell(result: Result) -> str:
        number, size = (result.estimate.collectives if result.estimate else {}).get(kind, (0, 0))
        return f"{number} x, {_size(size)}" if number else ""

    return cell


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f} ms"
