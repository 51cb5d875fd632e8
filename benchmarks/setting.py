"""What both benchmarks share: a model of a config's shape with random weights, a full bank, and a random batch."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from sapt_jax import sharding
from sapt_jax.methods.base import Method
from sapt_jax.models.families import DTYPES, init_params, make_model, read_shape
from sapt_jax.run import make_method
from sapt_jax.state import Frozen, Trainable, init_frozen

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/smollm2_superni.py", "Whose model and PET settings to time."
)
ROWS = flags.DEFINE_integer("rows", 8, "Rows of a batch.")
SOURCE = flags.DEFINE_integer("source", 96, "Source tokens of each row.")
TARGET = flags.DEFINE_integer("target", 16, "Answer tokens of each row.")
TASKS = flags.DEFINE_integer("tasks", 15, "Slots in the bank; timed at the first and the last.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls at each of them; the median is printed.")
DTYPE_NAMES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Compute and parameter types to time.")


def make_setting(config: Any, dtype: str, mesh: Any) -> tuple[Any, Method, Frozen, Trainable]:
    """(model, method, frozen tree with every slot filled, trainable tree) for a config."""
    shape = read_shape(config.model.path, config.model.variant)
    model = make_model(shape, dtype, config.model.remat, config.model.attention)
    base = init_params(model, sharding.abstract_params(model, mesh, DTYPES[dtype]), seed=0)
    method = make_method(config)
    sites, d_model = model.pet_sites(model.config), model.config.d_model
    table = base["token_embedder"]["embedding"]
    rng = np.random.default_rng(0)
    frozen = init_frozen(None, method.pet, sites, d_model, TASKS.value)
    frozen = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(x.dtype), frozen)
    frozen = frozen.replace(enabled=np.ones((TASKS.value,), bool), targets=np.eye(TASKS.value, dtype=np.float32))
    trainable = method.open_task(jax.random.key(0), sites, table, None)
    frozen, trainable = sharding.replicate((frozen, trainable), mesh)
    return model, method, frozen.replace(base=base), trainable


def random_batch(vocab_size: int, mesh: Any) -> dict[str, jax.Array]:
    """A batch without padding."""
    rng = np.random.default_rng(1)
    batch = {}
    for name, length in (("source", SOURCE.value), ("target", TARGET.value)):
        batch[name] = rng.integers(3, vocab_size, (ROWS.value, length)).astype(np.int32)
        batch[f"{name}_mask"] = np.ones((ROWS.value, length), bool)
    return sharding.place_batch(batch, mesh)


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


def run(title: str, measure: Callable[[Any, str, Any], tuple[list[float], Any]]) -> None:
    """Prints a table of results, with the device that they were measured on.

    Args:
      title: what is timed.
      measure: (config, type, mesh) -> (seconds at the first and at the last task, compiled program).
    """
    config = CONFIG.value
    mesh = sharding.make_mesh(config.mesh)
    device = jax.devices()[0]
    shape = f"{ROWS.value} x ({SOURCE.value} + {TARGET.value})"
    table = Table(
        title=f"{title}, {shape}\n{jax.device_count()} x {device.device_kind} ({device.platform})", title_justify="left"
    )
    for name in ("type", "task", "ms", "tokens/s", "peak MiB", f"task {TASKS.value} / task 1"):
        table.add_column(name, justify="right")
    tokens = ROWS.value * (SOURCE.value + TARGET.value)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        for dtype in DTYPE_NAMES.value:
            seconds, compiled = measure(config, dtype, mesh)
            ratios = ("", f"{seconds[1] / seconds[0]:.3f}")
            for task, time_taken, ratio in zip((1, TASKS.value), seconds, ratios, strict=True):
                figures = (f"{1e3 * time_taken:.0f}", f"{tokens / time_taken:,.0f}", f"{megabytes(compiled):,.0f}")
                table.add_row(dtype, str(task), *figures, ratio)
    Console(width=100, highlight=False).print(table)
