"""What the reflection loss (ARM) adds to a train step at the last task of a full bank: time and arithmetic.

python -m benchmarks.reflection --config=configs/smollm2_superni.py --rows=8 --source=96 --target=16
python -m benchmarks.reflection --config=configs/t5_tiny.py --rows=8 --source=256 --target=16

The features of pseudo-samples are constants, so it is a product with two narrow matrices and T keys, and no part of the
language model runs for it.
"""

import sys

import flax.linen as nn
import jax
from absl import app
from rich.console import Console
from rich.table import Table

from benchmarks import setting, train_step
from sapt_jax import sharding


def main(_) -> None:
    config = setting.CONFIG.value
    if config.method != "sapt":
        sys.exit(f"error: config.method={config.method!r} has no reflection loss: choose sapt.")
    mesh = sharding.make_mesh(config.mesh)
    last = setting.TASKS.value - 1
    calls, operations = [], []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(config.mesh.rules)):
        for kl_ratio in (0.0, config.sapt.kl_ratio):
            config.sapt.kl_ratio = kl_ratio
            call_at, compiled = train_step.prepare(config, config.model.dtype, mesh)
            calls.append(call_at(last))
            # A scan over layers is counted once, alike in both: only the difference says something.
            operations.append(compiled.cost_analysis()["flops"])
        without, with_reflection = setting.median_seconds(calls)
    table = Table(
        title=f"reflection loss, {setting.TASKS.value} tasks, {config.sapt.reflection_batch} pseudo-samples of each"
        f"\n{setting.hardware()}, {config.model.dtype}",
        title_justify="left",
    )
    for name in ("step without, ms", "step with, ms", "added", "added MFLOP"):
        table.add_column(name, justify="right")
    added = (operations[1] - operations[0]) / 1e6
    share = with_reflection / without - 1
    table.add_row(f"{1e3 * without:.1f}", f"{1e3 * with_reflection:.1f}", f"{share:+.1%}", f"{added:,.1f}")
    Console(width=100, highlight=False).print(table)


if __name__ == "__main__":
    app.run(main)
