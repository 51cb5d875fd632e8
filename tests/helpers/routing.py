"""A routed method after tasks whose inputs have given features, and the slots that it sends rows to."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.trees import at, empty_frozen, fresh


def end(method, frozen, sums, task, trainable):
    """The frozen tree after a task that ends with what a pass over its rows adds up to."""
    found = method.summarise(jax.tree.map(np.asarray, frozen.memory), sums)
    found = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)
    return method.end_task(frozen, trainable, found, at(task))


def learned(method, model, base, totals, capacity=3):
    """The frozen tree after tasks, each ended with what a pass over its rows adds up to.

    Args:
      totals: for each task, a function of (frozen, task) that gives these sums.
    """
    frozen = empty_frozen(method, model, base, capacity)
    for task, sums in enumerate(totals):
        frozen = end(method, frozen, sums(frozen, task), task, fresh(method, model, base, task))
    return frozen


def choices(method, frozen, rows, task, steps=0, training=False):
    """The slot [B] of each row of features; every row has one, with weight 1."""
    weights = np.asarray(method.weights(frozen, None, jnp.asarray(rows, jnp.float32), at(task, steps=steps), training))
    assert (np.sort(weights, axis=1)[:, -1] == 1).all() and (weights.sum(axis=1) == 1).all()
    return np.argmax(weights, axis=1)
