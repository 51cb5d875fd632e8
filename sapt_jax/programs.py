"""The jitted functions of a run. Of its inputs they depend on config, model, method and mesh alone.

What one of them returns is placed as the next one takes it, so that each compiles once for all tasks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sapt_jax import sharding
from sapt_jax.decoding.answers import Ends, Search, make_generate
from sapt_jax.methods.base import Apply, Batch, Logs, Method, Samples, Seen, real_rows
from sapt_jax.methods.losses import token_cross_entropy
from sapt_jax.models.families import parameters
from sapt_jax.optimization import make_optimizer, schedule_factor
from sapt_jax.state import Frozen, Task, Trainable, TrainState, Tree, abstract, rng


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions, with a method's hooks in them. Where a frozen tree comes without `base`, base is None.

    Attributes:
      state: the state of a task in training, as `jax.ShapeDtypeStruct`s with their shardings.
      begin_task: (frozen, previous trainable or None, seen, task) -> trainable.
      open_state: trainable -> the state before a task's first step.
      train_step: (frozen, state, batch, samples or None, task) -> (state, metrics); `state` is donated. `batch` holds
        `source` [B, S], `source_mask`, `target` [B, L], `target_mask`; B a multiple of the micro-batches.
      features: (base, source, source_mask) -> [B, F].
      weights: (frozen, trainable, source, source_mask, task) -> [B, T] at test time.
      passages: (frozen, trainable or None, batch, task) -> {"nll", "tokens"} of a batch's answers at test time, summed;
        without a trainable tree those of the bare model.
      generate: the same -> (tokens [B, N], weights [B, T]).
      measure: (frozen, trainable, batch, task) -> sums.
      end_task: (frozen without base, trainable, found or None, task) -> frozen without base.
    """

    state: TrainState
    begin_task: Callable
    open_state: Callable
    train_step: Callable
    features: Callable
    weights: Callable
    passages: Callable
    generate: Callable
    measure: Callable
    end_task: Callable


def make_programs(config: ConfigDict, model: nn.Module, method: Method, mesh: Mesh, ends: Ends) -> Programs:
    """The programs of a run; nothing is compiled before it is called."""
    apply, optimizer = make_apply(model), optimizer_of(config)
    declared = method.trainable_leaves(parameters(model))
    # Placement depends on logical axes, not on how many slots there are.
    of_frozen = sharding.shardings(method.frozen_leaves(parameters(model), 1), mesh)
    of_trainable = sharding.shardings(declared, mesh)

    def open_state(trainable: Trainable) -> TrainState:
        return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))

    state = jax.eval_shape(open_state, abstract(declared))
    of_state = sharding.shardings_like(state, declared, mesh)

    def begin_task(frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task) -> Trainable:
        key = rng(config.seed, "begin", task.index)
        return method.begin_task(key, declared, frozen, previous, seen, task)

    def features(base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        return method.features(apply, base, source, source_mask)

    def weights(
        frozen: Frozen, trainable: Trainable, source: jax.Array, source_mask: jax.Array, task: Task
    ) -> jax.Array:
        seen = method.features(apply, frozen.base, source, source_mask)
        return method.test_weights(frozen, trainable, seen, task)

    def passages(frozen: Frozen, trainable: Trainable | None, batch: Batch, task: Task) -> Logs:
        source, source_mask, target, target_mask = answers = [
            batch[name] for name in ("source", "source_mask", "target", "target_mask")
        ]
        mixture = None
        if trainable is not None:
            mixture = method.mixture(frozen, trainable, weights(frozen, trainable, source, source_mask, task), task)
        nll, tokens = token_cross_entropy(apply(frozen.base, *answers, mixture), target, target_mask)
        return {"nll": nll, "tokens": tokens}

    def measure(frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        return method.measure(apply, frozen, trainable, batch, task)

    whole = sharding.replicated(mesh)
    step = make_train_step(config, apply, method, optimizer)
    return Programs(
        state=sharding.with_shardings(state, of_state),
        begin_task=jax.jit(begin_task, out_shardings=of_trainable),
        open_state=jax.jit(open_state, out_shardings=of_state),
        train_step=jax.jit(step, donate_argnums=1, out_shardings=(of_state, whole)),
        features=jax.jit(features),
        weights=jax.jit(weights),
        passages=jax.jit(passages, out_shardings=whole),
        generate=make_generate(apply, method, ends, Search(config.eval.beams, config.eval.length_penalty)),
        measure=jax.jit(measure, out_shardings=whole),
        end_task=jax.jit(method.end_task, out_shardings=of_frozen),
    )


def make_apply(model: nn.Module) -> Apply:
    """`model.apply` on a base tree, as hooks are given it."""
    drops = getattr(model, "dropout", 0.0) > 0

    def apply(
        base: Tree,
        *arguments: Any,
        method: str | None = None,
        rng: jax.Array | None = None,
        collect: str | None = None,
    ) -> Any:
        rngs = {"dropout": rng} if drops and rng is not None else None
        told = model.apply(
            {"params": base}, *arguments, method=method, rngs=rngs, mutable=[collect] if collect else False
        )
        return told[1][collect] if collect else told

    return apply


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of a config.

    Raises:
      ValueError: from `make_optimizer`.
    """
    options = config.optimizer
    return make_optimizer(
        options.name, dict(options.options), options.learning_rate, options.rates, options.max_grad_norm
    )


def make_train_step(
    config: ConfigDict, apply: Apply, method: Method, optimizer: optax.GradientTransformation
) -> Callable:
    """Builds `step(frozen, state, batch, samples, task) -> (state, metrics)`.

    The task loss is the mean over all answer tokens of the effective batch, however it is split; or, by
    config.train.loss_mean, the mean over micro-batches with an answer of the mean over their own tokens. The
    micro-batches are scanned inside the step. The method's penalty is taken once per step. A step whose loss or
    gradient is not finite changes nothing but the count of steps.

    Metrics are arrays on the device: loss, task_loss, grad_norm, tokens, and what the method logs.
    """
    accumulation, options = config.train.accumulation, config.optimizer

    def step(
        frozen: Frozen, state: TrainState, batch: Batch, samples: Samples | None, task: Task
    ) -> tuple[TrainState, Logs]:
        task = task.replace(step=state.step)
        loss_key, penalty_key = jax.random.split(rng(config.seed, "step", task.index, state.step))
        # Every device keeps its rows: a micro-batch takes some of each device's.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        tokens = jnp.maximum(batch["target_mask"].sum(), 1)
        by_micro_batch = config.train.loss_mean == "micro_batches"
        answered = jnp.maximum(micro["target_mask"].any(axis=(1, 2)).sum(), 1) if by_micro_batch else 1

        def gradient(key: jax.Array, rows: Batch) -> tuple[jax.Array, Logs, Trainable]:
            # Divided before it is differentiated, so that gradients of micro-batches are of the size of the whole.
            def mean(trainable: Trainable) -> tuple[jax.Array, Logs]:
                total, logs = method.task_loss(apply, key, frozen, trainable, rows, task)
                if by_micro_batch:
                    return total / (jnp.maximum(rows["target_mask"].sum(), 1) * answered), logs
                return total / tokens, logs

            (loss, logs), grads = jax.value_and_grad(mean, has_aux=True)(state.trainable)
            return loss, logs, grads

        if accumulation == 1:
            loss, logs, grads = gradient(loss_key, jax.tree.map(lambda x: x[0], micro))
        else:
            keys = jax.random.split(loss_key, accumulation)
            like = jax.eval_shape(gradient, keys[0], jax.tree.map(lambda x: x[0], micro))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            (loss, logs, grads), _ = jax.lax.scan(
                lambda total, own: (jax.tree.map(jnp.add, total, gradient(*own)), None), zero, (keys, micro)
            )
        logs = jax.tree.map(lambda total: total / jnp.maximum(real_rows(batch).sum(), 1), logs)
        metrics = {"loss": loss, "task_loss": loss, **logs}

        if method.uses("penalty"):

            def penalty(trainable: Trainable) -> tuple[jax.Array, Logs]:
                return method.penalty(penalty_key, frozen, trainable, samples, task)

            (extra, logs), extra_grads = jax.value_and_grad(penalty, has_aux=True)(state.trainable)
            grads = jax.tree.map(jnp.add, grads, extra_grads)
            metrics |= {"loss": loss + extra, **logs}

        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        factor = schedule_factor(options.schedule, state.step, options.warmup_steps, task.steps)
        trainable = optax.apply_updates(state.trainable, jax.tree.map(lambda update: factor * update, updates))
        if method.uses("project"):
            trainable = method.project(frozen, state.trainable, trainable, task)
        norm = optax.tree.norm(grads)
        metrics |= {"grad_norm": norm, "tokens": batch["source_mask"].sum() + batch["target_mask"].sum()}
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        after = TrainState(trainable, opt_state, state.step + 1)
        untouched = state.replace(step=after.step)
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), after, untouched), metrics

    return step
