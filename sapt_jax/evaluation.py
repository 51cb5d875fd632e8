"""Answers to the inputs of a split, and the score that they get."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from sapt_jax.data.encoding import EncodedSplit
from sapt_jax.data.stream import EncodedTask
from sapt_jax.passes import decode_texts, map_sources, sum_batches
from sapt_jax.results import metrics, predictions
from sapt_jax.run import Run
from sapt_jax.state import Frozen, Task, Trainable, Tree
from sapt_jax.storage import preemption

Trees = tuple[Frozen, Trainable]


class Tested(NamedTuple):
    """How a task was answered.

    Attributes:
      score: 0 to 100.
      weights: [N, T] that its N inputs were answered with, as they are written; None where no answer has any.
      routed: [N] bool, whether an input's largest weight was on its own task; None where nothing routes.
    """

    score: float
    weights: np.ndarray | None
    routed: np.ndarray | None


def predict(run: Run, trees: Trees, split: EncodedSplit, task: Task) -> tuple[tuple[str, ...], np.ndarray]:
    """Answers to a split's inputs, and the weights [n, T] that each was found with."""

    def generate(source: jax.Array, source_mask: jax.Array) -> tuple[jax.Array, ...]:
        return run.programs.generate(*trees, source, source_mask, task)

    tokens, weights = map_sources(generate, split, run.layout, run.mesh)
    return decode_texts(tokens, run.tokenizer), weights


def features_of(run: Run, base: Tree, split: EncodedSplit) -> np.ndarray:
    """What the method sees of a split's inputs before it mixes: features [n, F]."""

    def features(source: jax.Array, source_mask: jax.Array) -> tuple[jax.Array, ...]:
        return (run.programs.features(base, source, source_mask),)

    return map_sources(features, split, run.layout, run.mesh)[0]


def mixture_weights(run: Run, trees: Trees, split: EncodedSplit, task: Task) -> np.ndarray:
    """The weights [n, T] that blocks are mixed with at test time for a split's inputs."""

    def weights(source: jax.Array, source_mask: jax.Array) -> tuple[jax.Array, ...]:
        return (run.programs.weights(*trees, source, source_mask, task),)

    return map_sources(weights, split, run.layout, run.mesh)[0]


def dev_score(run: Run, trees: Trees, task: EncodedTask, at: Task) -> float:
    """The score on a task's dev split."""
    texts, _ = predict(run, trees, task.dev, at)
    config = run.config
    return metrics.score_task(
        texts, task.task.dev, metric=task.task.metric, references=config.eval.references, seed=config.data.seed
    )


def general_loss(run: Run, trees: tuple[Frozen, Trainable | None], task: Task) -> float:
    """Mean NLL in nats a token of the second parts of `stream.general`'s passages, given their first.

    Args:
      trees: without a trainable tree, of the bare model.
      task: the last one, whose block a method answers with that has to be told one.
    """
    split, data = run.stream.general, run.config.data
    layout = dataclasses.replace(run.layout, buckets=((data.max_source_length, data.max_target_length),))
    found = sum_batches(lambda batch: run.programs.passages(*trees, batch, task), split, layout, run.mesh)
    return float(found["nll"] / found["tokens"])


def check_stored(run: Run, results: epath.Path) -> None:
    """Looks at all answers that earlier calls have stored, before anything rests on them.

    Raises:
      ValueError: from `predictions.read_predictions`.
    """
    tasks, learned = run.stream.tasks + run.stream.unseen, len(run.stream.tasks)
    names = [task.name for task in tasks]
    for index in range(learned):
        for tested in (*range(index + 1), *(range(learned, len(tasks)) if index == learned - 1 else ())):
            file = predictions.predictions_file(results, names, index, tested)
            if file.exists():
                predictions.read_predictions(file, tasks[tested].task.test)


def test(run: Run, trees: Trees, results: epath.Path, task_index: int, tested: int) -> Tested:
    """How task `tested` is answered after training `task_index`, from its predictions file where there is one.

    Unseen tasks are counted on after the last task.

    Raises:
      PreemptedError: the run was asked to stop; what was tested before is kept.
    """
    tasks, config = run.stream.tasks + run.stream.unseen, run.config
    names = [task.name for task in tasks]
    if preemption.requested():
        raise preemption.PreemptedError(f"before the test of {names[tested]} after task {names[task_index]}")
    file = predictions.predictions_file(results, names, task_index, tested)
    if file.exists():
        scores, weights = predictions.read_predictions(file, tasks[tested].task.test)
        return Tested(float(np.mean(scores)), weights, _routed(run, trees[0], weights, tested))
    task = tasks[tested]
    texts, weights = predict(run, trees, task.test, run.task(task_index, tested=min(tested, len(run.stream.tasks) - 1)))
    scores = metrics.score_instances(
        texts, task.task.test, metric=task.task.metric, references=config.eval.references, seed=config.data.seed
    )
    predictions.write_predictions(file, predictions.Answers(task.task.test, texts, scores, weights))
    weights = predictions.round_weights(weights)
    return Tested(float(scores.mean()), weights, _routed(run, trees[0], weights, tested))


def _routed(run: Run, frozen: Frozen, weights: np.ndarray | None, tested: int) -> np.ndarray | None:
    """[N] bool, of weights [N, T] as they are written; None where nothing chose among blocks with the task's own."""
    chooses = run.method.routes and run.config.eval.routing == "method"
    if weights is None or not chooses or tested >= len(run.stream.tasks):
        return None
    slot = run.method.slot_index(tested)
    return weights.argmax(axis=1) == slot if np.asarray(frozen.enabled)[slot] else None
