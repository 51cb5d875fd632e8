"""One task: from where it starts to the trainable tree that scored best on dev."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sapt_jax.data.batching import Prefetch, Share, Steps, steps_per_epoch, train_batches, whole_steps_per_epoch
from sapt_jax.data.lesson import Lesson
from sapt_jax.data.stream import EncodedTask
from sapt_jax.evaluation import dev_score
from sapt_jax.methods.base import Samples
from sapt_jax.optimization import schedule_factor
from sapt_jax.results.terminal import TrainingProgress
from sapt_jax.run import TRAIN, Run
from sapt_jax.sharding import own_slice, place_batch
from sapt_jax.state import Frozen, Trainable, TrainState
from sapt_jax.storage import preemption
from sapt_jax.storage.checkpoints import Loop, TaskCheckpoints
from sapt_jax.storage.costs import Costs, Meter


def epoch_steps(config: ConfigDict, num_rows: int, replayed: int = 0) -> int:
    """Updates of an epoch over `num_rows` training instances, each with `replayed` rows of earlier tasks besides."""
    options = config.train
    own = options.batch_size - replayed
    if options.partial_batch == "drop":
        return whole_steps_per_epoch(num_rows, own, options.accumulation)
    return steps_per_epoch(num_rows, own)


def total_steps(config: ConfigDict, num_rows: int, replayed: int = 0) -> int:
    """Updates of a task with `num_rows` training instances, as those of `epoch_steps`."""
    steps = config.train.epochs * epoch_steps(config, num_rows, replayed)
    return min(steps, config.train.max_steps) if config.train.max_steps else steps


class Fitted(NamedTuple):
    """The tree that scored best on dev, or the last one where nothing was evaluated; and what earlier calls spent."""

    trainable: Trainable
    before: Costs


def fit(run: Run, frozen: Frozen, begin: Callable[[], Trainable], lesson: Lesson, samples: Samples | None) -> Fitted:
    """Trains one task, or several together, going on from the latest checkpoint where there is one.

    The host runs ahead of the device: it hands over batches and reads the metrics of the interval before.

    Args:
      begin: gives what the task starts from.
      lesson: what its batches are made of.
      samples: of earlier tasks, for a method that wants them.

    Raises:
      PreemptedError: the run was asked to stop; the step it stands at is saved.
      FloatingPointError: the loss or a gradient was not finite; the last checkpoint was finite, and is kept.
    """
    task_index, config, meter = lesson.index, run.config, Meter()
    learned = [run.stream.tasks[index] for index in lesson.own_tasks]
    tested = [task for task in learned if len(task.dev)]
    replayed = lesson.replayed(config.train.batch_size)
    steps = total_steps(config, lesson.own, replayed)
    # Of all rows, also where epochs leave some out.
    period = config.train.eval_every_epochs * steps_per_epoch(lesson.own, config.train.batch_size - replayed)
    at = run.task(task_index, steps)
    name = run.stream.names[task_index]
    place = f"task {task_index + 1}/{len(run.stream.tasks)} {name}"
    if len(learned) > 1:
        place = f"{len(learned)} tasks together"
    if run.kind != TRAIN:
        place += f", {run.kind}"
    # However the task is left, what was saved on the way is on disk.
    with TaskCheckpoints(run.folder(task_index)) as checkpoints, contextlib.ExitStack() as stack:
        state, best, loop = _open(run, checkpoints, begin)
        before = loop.spent
        progress = stack.enter_context(TrainingProgress(run.console, place, steps, first_step=loop.step))
        curves = _Curves(run, task_index, place, progress, steps)
        profiler = _Profiler(run)
        for batch in _batches(run, lesson, loop, steps) if not loop.finished else ():
            profiler.at(loop.step + 1, state)
            state, metrics = run.programs.train_step(frozen, state, batch, samples, at)
            step = loop.step + 1
            curves.add(step, metrics)
            loop = dataclasses.replace(loop, step=step, finished=step == steps)
            whole_period = step % period == 0
            evaluate = whole_period or (loop.finished and config.train.evaluate_at_end)
            if evaluate and tested:
                score = float(np.mean([dev_score(run, (frozen, state.trainable), task, at) for task in tested]))
                loop = _after_evaluation(loop, score, config.train)
                run.log.log("dev", task_index=task_index, task=name, step=step, score=score, best=loop.best_score)
            if loop.best_step == step:
                best = jax.tree.map(jnp.copy, state.trainable)
            elif loop.best_score is None:
                best = state.trainable
            stops = preemption.requested()
            every = config.train.checkpoint_every_steps
            if evaluate or loop.finished or stops or (every and step % every == 0):
                # A run that goes on from here finds its curves up to here, and nothing that is not finite is saved.
                curves.flush()
                checkpoints.save(state, best, dataclasses.replace(loop, spent=before + meter.read()))
            if loop.finished:
                break
            if stops:
                raise preemption.PreemptedError(f"after step {step} of {place}")
        profiler.close(state)
        curves.close()
    return Fitted(best, before)


def _open(run: Run, checkpoints: TaskCheckpoints, begin: Callable[[], Trainable]) -> tuple[TrainState, Trainable, Loop]:
    """State, best tree so far and place in the loop: of the latest checkpoint, else of the task's beginning."""
    if (saved := checkpoints.restore(run.programs.state)) is not None:
        return saved
    state = run.programs.open_state(begin())
    return state, jax.tree.map(jnp.copy, state.trainable), Loop(buckets=run.stream.buckets)


def _after_evaluation(loop: Loop, score: float, options: Any) -> Loop:
    """Where the loop stands after an evaluation. `options` are those of config.train."""
    better = loop.best_score is None or score > loop.best_score
    stale = 0 if better else loop.stale + 1
    equal = score == loop.best_score and options.best_of_equals == "last"
    best_step = loop.step if better or equal else loop.best_step
    best_score = score if better else loop.best_score
    finished = loop.finished or bool(options.patience and stale >= options.patience)
    return dataclasses.replace(loop, best_step=best_step, best_score=best_score, stale=stale, finished=finished)


def _batches(run: Run, lesson: Lesson, loop: Loop, steps: int) -> Iterator[dict[str, Any]]:
    config, layout = run.config, run.stream.layout(run.config.train.batch_size)
    per_epoch = epoch_steps(config, lesson.own, lesson.replayed(layout.batch_size))
    batches = train_batches(
        lesson,
        dataclasses.replace(layout, buckets=loop.buckets, epoch_batches=per_epoch),
        Steps(config.seed, loop.step, steps),
        Share(*own_slice(run.mesh)),
        Prefetch(config.data.prefetch_threads, config.data.prefetch_batches),
    )
    return (place_batch(batch, run.mesh) for batch in batches)


class _Profiler:
    """Records the steps of config.train.profile_steps, of every task that this call trains, in TensorBoard's format."""

    def __init__(self, run: Run):
        self._window = run.config.train.profile_steps if run.kind == TRAIN else ()
        self._folder = str(run.workdir / "tensorboard")
        self._running = False

    def at(self, step: int, state: TrainState) -> None:
        """Tells that a step is about to be handed to the device."""
        if self._window and step == self._window[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._window and step == self._window[1] + 1:
            self.close(state)

    def close(self, state: TrainState) -> None:
        """Ends a recording that has begun, once its steps are done."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False


class _Curves:
    """Logs the mean metrics of every interval, one interval late, so that reading them does not hold up the device."""

    def __init__(self, run: Run, task_index: int, place: str, progress: TrainingProgress, steps: int):
        self._run, self._task_index, self._place, self._progress, self._steps = run, task_index, place, progress, steps
        self._task: EncodedTask = run.stream.tasks[task_index]
        self._filling: list[tuple[int, Any]] = []
        self._full: list[tuple[int, Any]] = []
        # Where no step was taken there is nothing to warn of.
        self._warning: str | None = None

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step, arrays on the device, and writes the interval before the one it completes."""
        self._filling.append((step, metrics))
        if step % self._run.config.train.log_every_steps == 0:
            self._write(self._full)
            self._full, self._filling = self._filling, []

    def flush(self) -> None:
        """Ends the interval here, and writes what is not written yet."""
        self._write(self._full)
        self._write(self._filling)
        self._full, self._filling = [], []
        self._run.log.flush()

    def close(self) -> None:
        """Warns of what the method found in the last interval."""
        if self._warning:
            logging.getLogger(__name__).warning("%s: %s", self._task.name, self._warning)

    def _write(self, interval: list[tuple[int, Any]]) -> None:
        if not interval:
            return
        fetched = jax.device_get([metrics for _, metrics in interval])
        for (step, _), metrics in zip(interval, fetched, strict=True):
            self._check_finite(step, metrics)
        step = interval[-1][0]
        tokens = sum(int(metrics["tokens"]) for metrics in fetched)
        mean = {name: np.mean([metrics[name] for metrics in fetched], axis=0) for name in fetched[0]}
        self._run.log.log(self._run.kind, task_index=self._task_index, task=self._task.name, step=step, **mean)
        self._progress.update(step, tokens=tokens, loss=mean["loss"])
        self._warning = self._run.method.warning(mean, self._run.method.slot_index(self._task_index))

    def _check_finite(self, step: int, metrics: Any) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            return
        options = self._run.config.optimizer
        factor = schedule_factor(options.schedule, step - 1, options.warmup_steps, self._steps)
        rate = options.learning_rate * float(factor)
        raise FloatingPointError(
            f"step {step} of {self._place}: the loss is {metrics['loss']:g} and the gradient's norm "
            f"{metrics['grad_norm']:g} at learning rate {rate:g}. The step was not taken, and the last checkpoint "
            "before it is kept. Lower config.optimizer.learning_rate, or config.optimizer.max_grad_norm."
        )
