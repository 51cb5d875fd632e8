"""A few steps of a method on random batches."""

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.config import default_config
from sapt_jax.programs import TrainState, make_apply, make_train_step, optimizer_of


def batch_of(seed, rows=3):
    rng = np.random.default_rng(seed)
    ids = {name: rng.integers(3, 100, (rows, 5)).astype(np.int32) for name in ("source", "target")}
    return ids | {f"{name}_mask": np.ones((rows, 5), bool) for name in ids}


def train(method, model, trees, task, steps=3):
    """(The trainable tree after some steps from trees = (frozen, trainable), the metrics of the last)."""
    (frozen, trainable), config = trees, default_config()
    optimizer = optimizer_of(config)
    step = jax.jit(make_train_step(config, make_apply(model), method, optimizer))
    state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
    for number in range(steps):
        state, metrics = step(frozen, state, batch_of(number), None, task)
    return state.trainable, metrics
