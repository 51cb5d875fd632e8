"""Time, tokens per second and memory of a train step, at the first and at the last task of a full bank.

python -m benchmarks.train_step --config=configs/smollm2_superni.py --rows=8 --source=96 --target=16
"""

import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import setting
from sapt_jax import partitioning
from sapt_jax.methods.protocol import Pools
from sapt_jax.optimization import make_optimizer
from sapt_jax.train import TaskScalars, TrainState, make_train_step


def measure(config, dtype: str, mesh) -> tuple[list[float], object]:
    """(seconds at the first and at the last task, compiled program) for one type."""
    model, method, frozen, trainable = setting.make_setting(config, dtype, mesh)
    optimizer = make_optimizer(1e-6, None, None, 0.9, 0.999, 1e-8, 0.0, 1.0)
    constant, placed = lambda step, total: 1.0, partitioning.replicated(mesh)
    step = make_train_step(model, method, optimizer, constant, config.train.accumulation, 0, placed)
    state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
    tasks, batch = setting.TASKS.value, setting.random_batch(model.config.vocab_size, mesh)
    pooled = np.random.default_rng(2).normal(size=(tasks, 20, model.config.d_model)).astype(np.float32)
    state, pools = partitioning.replicate((state, Pools(pooled, np.full((tasks,), 20, np.int32))), mesh)
    scalars = [partitioning.replicate(TaskScalars(*np.array([t, t, 100], np.int32)), mesh) for t in (0, tasks - 1)]
    compiled = step.lower(frozen, state, batch, pools, scalars[0]).compile()

    def call(task):
        def run():
            nonlocal state
            state, metrics = compiled(frozen, state, batch, pools, task)
            return metrics

        return run

    return setting.median_seconds([call(task) for task in scalars]), compiled


if __name__ == "__main__":
    app.run(lambda _: setting.run("train step", measure))
