"""The train step: task loss over micro-batches, reflection loss once, one update of the trainable tree."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from sapt_jax import losses
from sapt_jax.methods import shared_attention
from sapt_jax.methods.base import Method, Pools
from sapt_jax.state import Frozen, Trainable

Batch = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """What a step changes: the trainable tree, the optimizer's state, and the number of steps done in this task."""

    trainable: Trainable
    opt_state: Any
    step: jax.Array


def init_state(optimizer: optax.GradientTransformation, trainable: Trainable) -> TrainState:
    """The state before a task's first step."""
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))


@struct.dataclass
class TaskScalars:
    """What a step needs to know of its task, each [] int32.

    Attributes:
      index: place in the sequence, from 0.
      slot_index: the slot it trains.
      total_steps: its number of steps.
    """

    index: jax.Array
    slot_index: jax.Array
    total_steps: jax.Array


def pooled_source(model: nn.Module, method: Any, base: Any, source: jax.Array, source_mask: jax.Array) -> jax.Array:
    """Pooled embeddings [B, D] of the source tokens, what the query sees of an input."""
    embeddings = model.apply({"params": base}, source, method="embed")
    return shared_attention.pool(embeddings, source_mask, method.pool_padding)


def attention_weights(
    model: nn.Module,
    method: Method,
    frozen: Frozen,
    trainable: Trainable,
    source: jax.Array,
    source_mask: jax.Array,
    slot_index: jax.Array,
) -> jax.Array:
    """Attention [B, T] of a batch of inputs."""
    pooled = pooled_source(model, method, frozen.base, source, source_mask)
    return jnp.exp(method.log_weights(frozen, trainable, pooled, slot_index))


def make_train_step(
    model: nn.Module,
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array, jax.Array], jax.Array],
    accumulation: int,
    seed: int,
    out_shardings: Any,
) -> Callable:
    """Builds `step(frozen, state, batch, pools, task) -> (state, metrics)`, jitted, `state` donated.

    The task loss is the mean over all answer tokens of the effective batch, however it is split: `accumulation`
    micro-batches are scanned inside the step. The auxiliary loss is taken once per step.

    Args of the step:
      batch: `source` [B, S], `source_mask`, `target` [B, L], `target_mask`; B a multiple of `accumulation`.
      pools: pseudo-samples of earlier tasks.
      task: traced, so that all tasks share one program for each batch shape.

    `schedule(step, total_steps)` is the share of the peak learning rates at a step. `out_shardings` are those of
    (state, metrics) on a mesh, or a tree that starts theirs: what goes into the next step has to be placed as what
    came into this one.

    Metrics are arrays on the device: loss, task_loss, reflection_loss, grad_norm, tokens, attention [T].
    """
    base_rng = jax.random.key(seed)

    def task_loss(trainable: Trainable, frozen: Frozen, batch: Batch, slot_index: jax.Array, tokens: jax.Array):
        pooled = pooled_source(model, method, frozen.base, batch["source"], batch["source_mask"])
        weights = method.learning_weights(frozen, trainable, pooled, slot_index)
        mixture = method.mixture(frozen, trainable, weights, slot_index)
        logits = model.apply(
            {"params": frozen.base},
            batch["source"],
            batch["source_mask"],
            batch["target"],
            batch["target_mask"],
            mixture,
        )
        nll, _ = losses.token_cross_entropy(logits, batch["target"], batch["target_mask"])
        real = batch["source_mask"].any(axis=1)
        return nll / tokens, jnp.sum(weights * real[:, None], axis=0)

    def step(frozen: Frozen, state: TrainState, batch: Batch, pools: Pools, task: TaskScalars):
        tokens = jnp.maximum(batch["target_mask"].sum(), 1)
        # Every device keeps its rows: a micro-batch takes some of each device's.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

        def accumulate(total, rows):
            value_and_grad = jax.value_and_grad(task_loss, has_aux=True)
            (loss, attention), grads = value_and_grad(state.trainable, frozen, rows, task.slot_index, tokens)
            return jax.tree.map(jnp.add, total, (loss, attention, grads)), None

        capacity = frozen.keys.shape[0]
        zero = (jnp.zeros(()), jnp.zeros((capacity,)), jax.tree.map(jnp.zeros_like, state.trainable))
        if accumulation == 1:
            (loss, attention, grads), _ = accumulate(zero, jax.tree.map(lambda x: x[0], micro))
        else:
            (loss, attention, grads), _ = jax.lax.scan(accumulate, zero, micro)

        def auxiliary(trainable):
            rng = jax.random.fold_in(jax.random.fold_in(base_rng, task.index), state.step)
            return method.auxiliary_loss(rng, frozen, trainable, pools, task.slot_index)

        (extra, logged), extra_grads = jax.value_and_grad(auxiliary, has_aux=True)(state.trainable)
        grads = jax.tree.map(jnp.add, grads, extra_grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        factor = schedule(state.step, task.total_steps)
        updates = jax.tree.map(lambda update: factor * update, updates)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": loss + extra,
            "task_loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "tokens": (batch["source_mask"].sum() + batch["target_mask"].sum()),
            "attention": attention / jnp.maximum(batch["source_mask"].any(axis=1).sum(), 1),
            **logged,
        }
        return TrainState(trainable, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=1, out_shardings=out_shardings)
