"""What the benchmarks share: a run's programs on a model with random weights, a full bank, and a random batch."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from sapt_jax import sharding, state
from sapt_jax.config import make_method
from sapt_jax.decoding.answers import Ends
from sapt_jax.methods import Method
from sapt_jax.methods.base import Samples
from sapt_jax.models.families import DTYPES, init_params, make_model, parameters, read_shape
from sapt_jax.programs import Programs, make_programs
from sapt_jax.state import Frozen, Task, Trainable, Tree

CONFIG = config_flags.DEFINE_config_file("config", "configs/smollm2_superni.py", "Whose run to time.")
ROWS = flags.DEFINE_integer("rows", 8, "Rows of a batch.")
SOURCE = flags.DEFINE_integer("source", 96, "Source tokens of each row.")
TARGET = flags.DEFINE_integer("target", 16, "Answer tokens of each row.")
TASKS = flags.DEFINE_integer("tasks", 15, "Tasks of the run; timed at the first and the last.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls at each of them; the median is printed.")
DTYPE_NAMES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute and parameter types to time.")

STEPS = 100
SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run before its tasks.

    Attributes:
      base: random weights.
    """

    mesh: Mesh
    model: nn.Module
    method: Method
    programs: Programs
    base: Tree

    @property
    def capacity(self) -> int:
        """Slots of the bank."""
        return self.method.capacity(TASKS.value)

    def task(self, index: int) -> Task:
        """What a program is told of a task."""
        slot = self.method.slot_index(index)
        rows = np.int32(slot) if self.method.needs_task_id else None
        return sharding.replicate(Task(np.int32(index), np.int32(slot), np.int32(STEPS), rows), self.mesh)

    def trees(self) -> tuple[Frozen, Trainable]:
        """Random blocks in every slot, each put there as the run does at the end of its task, and one in training."""
        leaves = self.method.frozen_leaves(parameters(self.model), self.capacity)
        frozen = sharding.create(lambda: state.start(jax.random.key(0), leaves, None), leaves, self.mesh)
        frozen = frozen.replace(enabled=sharding.replicate(np.ones((self.capacity,), bool), self.mesh))
        rng = np.random.default_rng(0)
        for index in range(TASKS.value):
            trainable = self._draw(rng)
            after = self.programs.end_task(frozen, trainable, self._found(frozen, trainable, index), self.task(index))
            frozen = after.replace(enabled=frozen.enabled)
        return frozen.replace(base=self.base), trainable

    def samples(self) -> Samples | None:
        """Random features for every slot; None where the method wants none."""
        if self.method.samples != "inputs":
            return None
        batch = self.batch()
        features = jax.eval_shape(self.programs.features, self.base, batch["source"], batch["source_mask"])
        shape = (self.capacity, SAMPLES, features.shape[-1])
        drawn = np.random.default_rng(2).normal(size=shape).astype(np.float32)
        return sharding.replicate(Samples(drawn, np.full((self.capacity,), SAMPLES, np.int32)), self.mesh)

    def batch(self) -> dict[str, jax.Array]:
        """A batch without padding."""
        rng = np.random.default_rng(1)
        batch = {}
        for name, length in (("source", SOURCE.value), ("target", TARGET.value)):
            batch[name] = rng.integers(3, self.model.config.vocab_size, (ROWS.value, length)).astype(np.int32)
            batch[f"{name}_mask"] = np.ones((ROWS.value, length), bool)
        return sharding.place_batch(batch, self.mesh)

    def _draw(self, rng: np.random.Generator) -> Trainable:
        like = self.programs.state.trainable
        drawn = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(x.dtype), like)
        return jax.device_put(drawn, jax.tree.map(lambda x: x.sharding, like))

    def _found(self, frozen: Frozen, trainable: Trainable, index: int) -> Tree | None:
        """What the method finds after a task, in one batch instead of a pass."""
        if self.method.pass_after is None:
            return None
        totals = self.programs.measure(frozen.replace(base=self.base), trainable, self.batch(), self.task(index))
        if self.method.features_after:
            batch = self.batch()
            totals["features"] = self.programs.features(self.base, batch["source"], batch["source_mask"])
        memory, totals = jax.tree.map(np.asarray, (frozen.memory, totals))
        found = self.method.summarise(memory, totals)
        return sharding.replicate(jax.tree.map(lambda x: np.asarray(x, np.float32), found), self.mesh)


def make_setting(config: ConfigDict, dtype: str, mesh: Mesh) -> Setting:
    """The run of a config, with its model in one type."""
    shape = read_shape(config.model.path, config.model.variant)
    options, method = config.model, make_method(config)
    model = make_model(shape, dtype, options.remat, options.attention, options.dropout)
    base = init_params(model, sharding.abstract_params(model, mesh, DTYPES[dtype]), seed=0)
    # An end token that no answer can hold.
    programs = make_programs(config, model, method, mesh, Ends(TARGET.value, eos_id=-1, pad_id=0))
    return Setting(mesh, model, method, programs, base)


def median_seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median time of each call; the calls take turns, so that a slow spell of the machine hits all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS.value + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def megabytes(compiled: Any) -> float:
    """Peak device memory of a compiled program: arguments, outputs and temporaries, less what is donated."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return (total - memory.alias_size_in_bytes) / 2**20


def hardware() -> str:
    """The devices, for titles."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform})"


def run(title: str, measure: Callable[[ConfigDict, str, Mesh], tuple[list[float], Any]]) -> None:
    """Prints a table of results, with the device that they were measured on.

    Args:
      title: what is timed.
      measure: (config, type, mesh) -> (seconds at the first and at the last task, compiled program).
    """
    config = CONFIG.value
    mesh = sharding.make_mesh(config.mesh)
    table = Table(
        title=f"{title}, {config.method} with {config.pet.kind}, {ROWS.value} x ({SOURCE.value} + {TARGET.value})"
        f"\n{hardware()}",
        title_justify="left",
    )
    for name in ("type", "task", "ms", "tokens/s", "peak MiB", f"task {TASKS.value} / task 1"):
        table.add_column(name, justify="right")
    tokens = ROWS.value * (SOURCE.value + TARGET.value)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(config.mesh.rules)):
        for dtype in DTYPE_NAMES.value:
            seconds, compiled = measure(config, dtype, mesh)
            ratios = ("", f"{seconds[1] / seconds[0]:.3f}")
            for task, time_taken, ratio in zip((1, TASKS.value), seconds, ratios, strict=True):
                figures = (f"{1e3 * time_taken:.0f}", f"{tokens / time_taken:,.0f}", f"{megabytes(compiled):,.0f}")
                table.add_row(dtype, str(task), *figures, ratio)
    Console(width=100, highlight=False).print(table)
