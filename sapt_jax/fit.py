"""One task: from its fresh slot to the trainable tree that scored best on dev."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.console import Console

from sapt_jax.data.batching import steps_per_epoch, train_batches
from sapt_jax.data.stream import EncodedTask
from sapt_jax.programs import TaskScalars
from sapt_jax.results.curves import RunLog
from sapt_jax.results.metrics import score_task
from sapt_jax.results.terminal import TrainingProgress
from sapt_jax.run import Learner
from sapt_jax.sharding import own_slice, place_batch, replicate
from sapt_jax.state import Frozen, Trainable
from sapt_jax.storage import preemption
from sapt_jax.storage.checkpoints import Loop, TaskCheckpoints

CLOSED_GATE = 0.01


def total_steps(config: Any, num_rows: int) -> int:
    """Updates of a task with `num_rows` training instances."""
    steps = config.train.epochs * steps_per_epoch(num_rows, config.train.batch_size)
    return min(steps, config.train.max_steps) if config.train.max_steps else steps


def fit(
    config: Any,
    learner: Learner,
    frozen: Frozen,
    trainable: Trainable,
    task_index: int,
    folder: epath.Path,
    log: RunLog,
    kind: str,
    console: Console,
) -> Trainable:
    """Trains one task, going on from its latest checkpoint where there is one.

    The host runs ahead of the device: it hands over batches and reads the metrics of the interval before.

    Args:
      trainable: the fresh tree of this task.
      folder: the task's folder of checkpoints.
      kind: what the curves are called, "train" for the task itself.

    Returns:
      The tree that scored best on dev (the last of equals), or the last one where there is no dev split.

    Raises:
      PreemptedError: the run was asked to stop; the step it stands at is saved.
    """
    task = learner.stream.tasks[task_index]
    steps = total_steps(config, len(task.train))
    per_epoch = steps_per_epoch(len(task.train), config.train.batch_size)
    state = learner.open_state(trainable)
    pools = learner.pools(frozen, task_index)
    checkpoints = TaskCheckpoints(folder)
    if (saved := checkpoints.restore(state)) is not None:
        state, best, loop = saved
    else:
        state = state.replace(trainable=learner.warm_start(config.seed, task_index, frozen, trainable, pools))
        best, loop = jax.tree.map(jnp.copy, state.trainable), Loop(buckets=learner.stream.buckets)
    slot_index = learner.method.slot_index(task_index)
    scalars = replicate(TaskScalars(*np.array([task_index, slot_index, steps], np.int32)), learner.mesh)
    place = f"task {task_index + 1}/{len(learner.stream.tasks)} {task.name}"
    if kind != "train":
        place += f", {kind}"
    with TrainingProgress(console, place, steps, first_step=loop.step) as progress:
        curves = _Curves(config, task, task_index, slot_index, log, kind, progress)
        for batch in _batches(config, learner, task, task_index, loop, steps) if not loop.finished else ():
            state, metrics = learner.train_step(frozen, state, batch, pools, scalars)
            step = loop.step + 1
            curves.add(step, metrics)
            loop = dataclasses.replace(loop, step=step, finished=step == steps)
            evaluate = loop.finished or step % (config.train.eval_every_epochs * per_epoch) == 0
            if evaluate and len(task.dev):
                score = _dev_score(config, learner, frozen, state.trainable, task, slot_index)
                loop = _after_evaluation(loop, score, config.train.patience)
                log.log("dev", task_index=task_index, task=task.name, step=step, score=score, best=loop.best_score)
            if loop.best_step == step:
                best = jax.tree.map(jnp.copy, state.trainable)
            elif not len(task.dev):
                best = state.trainable
            stops = preemption.requested()
            every = config.train.checkpoint_every_steps
            if evaluate or stops or (every and step % every == 0):
                # A run that goes on from here finds its curves up to here.
                curves.flush()
                checkpoints.save(state, best, loop)
            if loop.finished:
                break
            if stops:
                checkpoints.close()
                raise preemption.PreemptedError(f"after step {step} of {place}")
        curves.close()
    checkpoints.close()
    return best


def _after_evaluation(loop: Loop, score: float, patience: int) -> Loop:
    better = loop.best_score is None or score > loop.best_score
    stale = 0 if better else loop.stale + 1
    best_step = loop.step if better or score == loop.best_score else loop.best_step
    best_score = score if better else loop.best_score
    finished = loop.finished or bool(patience and stale >= patience)
    return dataclasses.replace(loop, best_step=best_step, best_score=best_score, stale=stale, finished=finished)


def _batches(
    config: Any, learner: Learner, task: EncodedTask, task_index: int, loop: Loop, steps: int
) -> Iterator[dict[str, jax.Array]]:
    batches = train_batches(
        task.train,
        loop.buckets,
        batch_size=config.train.batch_size,
        seed=config.seed,
        task_index=task_index,
        start_step=loop.step,
        num_steps=steps,
        padding_side=learner.model.padding_side,
        pad_id=learner.tokenizer.pad_id,
        **own_slice(learner.mesh),
        prefetch_threads=config.data.prefetch_threads,
        prefetch_batches=config.data.prefetch_batches,
    )
    return (place_batch(batch, learner.mesh) for batch in batches)


def _dev_score(config, learner: Learner, frozen, trainable, task: EncodedTask, slot_index: int) -> float:
    texts, _ = learner.predict(frozen, trainable, task.dev, slot_index)
    return score_task(
        texts, task.task.dev, metric=task.task.metric, references=config.eval.references, seed=config.data.seed
    )


class _Curves:
    """Logs the mean metrics of every interval, one interval late, so that reading them does not hold up the device."""

    def __init__(
        self,
        config: Any,
        task: EncodedTask,
        task_index: int,
        slot_index: int,
        log: RunLog,
        kind: str,
        progress: TrainingProgress,
    ):
        self._every = config.train.log_every_steps
        self._task, self._task_index, self._slot = task, task_index, slot_index
        self._log, self._kind, self._progress = log, kind, progress
        self._filling: list[tuple[int, Any]] = []
        self._full: list[tuple[int, Any]] = []
        # Where no step was taken there is nothing to warn of.
        self._gate_open = True

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step, arrays on the device, and writes the interval before the one it completes."""
        self._filling.append((step, metrics))
        if step % self._every == 0:
            self._write(self._full)
            self._full, self._filling = self._filling, []

    def flush(self) -> None:
        """Ends the interval here, and writes what is not written yet."""
        self._write(self._full)
        self._write(self._filling)
        self._full, self._filling = [], []
        self._log.flush()

    def close(self) -> None:
        """Warns where the new slot was never used."""
        if not self._gate_open:
            logging.getLogger(__name__).warning(
                "%s: the mean attention on the new slot stayed under %.0f%%, so older blocks learned the task. Raise "
                "config.attention.warm_start_steps, or lower config.kl_ratio.",
                self._task.name,
                100 * CLOSED_GATE,
            )

    def _write(self, interval: list[tuple[int, Any]]) -> None:
        if not interval:
            return
        step = interval[-1][0]
        fetched = jax.device_get([metrics for _, metrics in interval])
        tokens = sum(int(metrics["tokens"]) for metrics in fetched)
        mean = {name: np.mean([metrics[name] for metrics in fetched], axis=0) for name in fetched[0]}
        self._log.log(self._kind, task_index=self._task_index, task=self._task.name, step=step, **mean)
        self._progress.update(step, tokens=tokens, loss=mean["loss"])
        self._gate_open = mean["attention"][self._slot] >= CLOSED_GATE
