"""Time, tokens per second and memory of a train step, at the first and at the last task of a full bank.

python -m benchmarks.train_step --config=configs/smollm2_superni.py --rows=8 --source=96 --target=16
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import setting
from sapt_jax import sharding
from sapt_jax.methods.base import Pools
from sapt_jax.optimization import make_optimizer
from sapt_jax.programs import TaskScalars, TrainState, make_train_step

POOL_SIZE = 20


def prepare(config: Any, dtype: str, mesh: Any) -> tuple[Callable[[int], Callable[[], Any]], Any]:
    """(task -> a call of one step at that task, compiled program) for one type."""
    model, method, frozen, trainable = setting.make_setting(config, dtype, mesh)
    optimizer = make_optimizer(1e-6, None, None, 0.9, 0.999, 1e-8, 0.0, 1.0)
    constant, placed = lambda step, total: 1.0, sharding.replicated(mesh)
    step = make_train_step(model, method, optimizer, constant, config.train.accumulation, 0, placed)
    state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
    tasks, batch = setting.TASKS.value, setting.random_batch(model.config.vocab_size, mesh)
    pooled = np.random.default_rng(2).normal(size=(tasks, POOL_SIZE, model.config.d_model)).astype(np.float32)
    pools = Pools(pooled, np.full((tasks,), POOL_SIZE, np.int32))
    state, pools = sharding.replicate((state, pools), mesh)

    def scalars(task):
        return sharding.replicate(TaskScalars(*np.array([task, task, 100], np.int32)), mesh)

    compiled = step.lower(frozen, state, batch, pools, scalars(0)).compile()

    def call_at(task):
        own = scalars(task)

        def call():
            nonlocal state
            state, metrics = compiled(frozen, state, batch, pools, own)
            return metrics

        return call

    return call_at, compiled


def measure(config: Any, dtype: str, mesh: Any) -> tuple[list[float], Any]:
    """(seconds at the first and at the last task, compiled program) for one type."""
    call_at, compiled = prepare(config, dtype, mesh)
    return setting.median_seconds([call_at(0), call_at(setting.TASKS.value - 1)]), compiled


if __name__ == "__main__":
    app.run(lambda _: setting.run("train step", measure))
