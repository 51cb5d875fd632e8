"""Random state trees of a method on a small model, and the tasks that programs are told of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax import state
from sapt_jax.methods.base import Seen
from sapt_jax.models.families import parameters
from sapt_jax.state import Task


def at(index, slot=None, steps=10, rows=None):
    """A task by its index; its slot is the same where none is given."""
    numbers = (index, index if slot is None else slot, steps)
    return Task(*(jnp.asarray(number, jnp.int32) for number in numbers), rows=rows)


def noise(seed, tree, scale=0.3):
    """Random values in the shapes of a tree of arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), tree)


def init_base(model, seed=0):
    """Random base parameters of a model."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed), ids, ids == 0, ids, ids == 0)["params"])


def empty_frozen(method, model, base, tasks):
    """An empty bank and memory around a base tree."""
    leaves = method.frozen_leaves(parameters(model), tasks)
    return state.empty(leaves).replace(base=base, enabled=jnp.ones((tasks,), bool))


def random_targets(seed, tasks):
    """Reflection targets [T, T] as tasks leave them: each row sums to one over the slots up to its own."""
    targets = np.tril(np.random.default_rng(seed).random((tasks, tasks)) + 0.1)
    return jnp.asarray(targets / targets.sum(axis=1, keepdims=True), jnp.float32)


def random_frozen(method, model, base, tasks, seed, scale=0.3):
    """Every slot of the bank and all of the memory random, so that every path of a gradient carries something."""
    frozen = empty_frozen(method, model, base, tasks)
    frozen = frozen.replace(bank=noise(seed, frozen.bank, scale), memory=noise(seed + 1, frozen.memory, scale))
    if "reflection_targets" in frozen.memory:
        targets = random_targets(seed + 2, tasks)
        frozen = frozen.replace(memory={**frozen.memory, "reflection_targets": targets})
    return frozen


def fresh(method, model, base, seed, previous=None, frozen=None, seen=None, task=None):
    """What a task starts from."""
    frozen = empty_frozen(method, model, base, 1) if frozen is None else frozen
    leaves = method.trainable_leaves(parameters(model))
    return method.begin_task(jax.random.key(seed), leaves, frozen, previous, seen or Seen(), task or at(0))


def random_bank(kind, model, tasks, seed, scale=0.3):
    """A bank of random blocks of a kind of PET on a model."""
    return noise(seed, state.abstract(state.bank_of(kind.block(parameters(model)), tasks)), scale)
