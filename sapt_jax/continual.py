"""The task sequence: open a slot, fit, measure the reflection target, commit, save, test; resumable at every step."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from sapt_jax import sharding
from sapt_jax.config import check_config, check_same_run, flatten, record_config
from sapt_jax.data.benchmarks import SUPERNI_CATEGORIES, resolve_task_order
from sapt_jax.data.stream import split_names
from sapt_jax.fit import fit
from sapt_jax.pseudo_samples.writer import make_generator, with_written_pool
from sapt_jax.results import metrics, terminal
from sapt_jax.results.curves import RunLog
from sapt_jax.results.predictions import predictions_file, write_predictions
from sapt_jax.results.scores import read_single_task_scores, write_scores
from sapt_jax.run import Learner, build, make_method
from sapt_jax.state import Frozen, Trainable, grow
from sapt_jax.storage import checkpoints, preemption
from sapt_jax.storage.paths import as_path

# The settings that a score depends on beside model and training; they are told with every score.
PROTOCOL = (
    "data.dev_is_test",
    "data.truncation",
    "data.references",
    "data.target_keeps_end",
    "data.add_bos",
    "data.max_source_length",
    "data.max_target_length",
    "data.dev_size",
    "data.max_train",
    "data.max_dev",
    "data.max_test",
    "data.seed",
    "data.on_bad_instance",
    "attention.pool_padding",
    "pet.kind",
    "pet.stop_gradient_through_bank",
    "eval.references",
    "eval.max_new_tokens",
    "eval.beams",
    "eval.length_penalty",
    "data_source",
    "disabled_tasks",
)


def run(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Teaches a model a sequence of tasks, or goes on where an earlier call with this workdir stopped.

    Args:
      workdir: a local folder, or a path of file:///, gs:// or s3://.

    Returns:
      What `scores.json` holds.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault, before anything is changed.
      PreemptedError: the run was asked to stop (`preemption`); the same call goes on.
    """
    workdir = as_path(workdir)
    check_config(config)
    check_same_run(config, workdir)
    names = resolve_task_order(config.task_order, config.benchmark)
    checkpoints.check_order(workdir, names)
    disabled = _disabled_tasks(config, names, workdir)
    single_task_scores = _single_task_scores(config, names)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(config.mesh.rules)):
        learner, base = build(config, mesh)
        record_config(config, workdir)
        return _run_tasks(config, learner, base, workdir, disabled, single_task_scores)


def _run_tasks(
    config: Any,
    learner: Learner,
    base: Any,
    workdir: epath.Path,
    disabled: tuple[str, ...],
    single_task_scores: dict[str, float],
) -> dict[str, Any]:
    names = learner.stream.names
    folders = [checkpoints.task_folder(workdir, index, name) for index, name in enumerate(names)]
    # What a withdrawn task's absence changes lies beside what was found with it, not over it.
    results = workdir / f"without-{'-'.join(disabled)}" if disabled else workdir
    capacity = learner.method.capacity(max(len(names), config.pet.capacity))
    frozen = learner.init_frozen(base, capacity, disabled)
    cut = learner.stream.truncated()
    console = terminal.make_console()
    console.quiet = jax.process_index() != 0
    console.print(
        f"{len(names)} tasks, {sum(len(task.train) for task in learner.stream.tasks)} training rows, batch shapes "
        f"{', '.join(f'{source}+{target}' for source, target in learner.stream.buckets)}, "
        f"{learner.stream.padding(config.train.batch_size):.1%} padding, {sum(n for n, _ in cut.values())} prompts and "
        f"{sum(n for _, n in cut.values())} answers cut"
    )
    generates = config.pseudo_samples.source == "generate" and learner.method.uses_pseudo_samples
    generator = make_generator(config, learner) if generates else None
    trainable = None
    matrix = metrics.empty_matrix(len(names))
    with RunLog(workdir, resume_from=_resume_point(folders)) as log:
        for index, folder in enumerate(folders):
            fresh = learner.open_task(config.seed, index, base, trainable)
            if checkpoints.has_committed(folder):
                saved = learner.init_frozen(base, checkpoints.saved_capacity(folder), ())
                saved, trainable = checkpoints.load_committed(folder, saved, fresh)
                rest = sharding.place(grow(saved.replace(base=None), capacity), learner.mesh)
                frozen = rest.replace(base=base, enabled=frozen.enabled)
            else:
                trainable = fit(config, learner, frozen, fresh, index, folder, log, "train", console)
                target = _reflection_target(learner, frozen, trainable, index)
                frozen = learner.commit(frozen, trainable, target, index)
                checkpoints.save_committed(folder, frozen, trainable)
            row = [_test(config, learner, frozen, trainable, results, index, tested) for tested in range(index + 1)]
            matrix = metrics.with_row(matrix, index, row)
            log.log("scores", task_index=index, task=names[index], step=0, scores=row)
            unseen = {}
            if index == len(names) - 1:
                unseen = {
                    task.name: _test(config, learner, frozen, trainable, results, index, len(names) + number)
                    for number, task in enumerate(learner.stream.unseen)
                }
            scores = _write_scores(config, learner, results, matrix, frozen, unseen, single_task_scores)
            table = terminal.score_table(
                matrix, names, scores["metric_per_task"], title=f"Scores, {config.method}", width=console.width
            )
            console.print(table)
            # The last task needs none until a longer order goes on from it.
            if generator and index + 1 < len(names):
                arguments = (frozen, trainable, index, folder, log, console)
                learner = with_written_pool(config, generator, learner, *arguments)
    for category, score in scores.get("category_scores", {}).items():
        console.print(f"mean of {category}: {terminal.format_score(score)}")
    for name, score in unseen.items():
        console.print(f"never trained on: {name} {terminal.format_score(score)}")
    places = {
        "scores": results / "scores.json",
        "predictions": results / "predictions",
        "curves": workdir / "tensorboard",
    }
    console.print(terminal.closing_summary(scores["summary"], places, scores["protocol"]))
    return scores


def _disabled_tasks(config: Any, names: tuple[str, ...], workdir: epath.Path) -> tuple[str, ...]:
    disabled = resolve_task_order(config.disabled_tasks, config.benchmark) if config.disabled_tasks else ()
    method = make_method(config)
    for name in disabled:
        if name not in names:
            raise ValueError(f"config.disabled_tasks names {name}, which is not in config.task_order.")
        index = names.index(name)
        if not checkpoints.has_committed(checkpoints.task_folder(workdir, index, name)):
            raise ValueError(
                f"config.disabled_tasks names {name}, which this run has not learned: take it out of the order."
            )
        if [method.slot_index(other) for other in range(len(names))].count(method.slot_index(index)) > 1:
            raise ValueError(
                f"config.disabled_tasks names {name}, but with config.method={config.method!r} tasks share a block: "
                "none of them can be withdrawn."
            )
    return disabled


def _protocol(config: Any) -> dict[str, Any]:
    values = flatten(config)
    return {name: values[name] for name in PROTOCOL}


def _single_task_scores(config: Any, names: tuple[str, ...]) -> dict[str, float]:
    workdirs = split_names(config.eval.single_task_runs)
    scores = read_single_task_scores(workdirs, _protocol(config))
    missing = [name for name in names if name not in scores]
    if workdirs and missing:
        raise ValueError(f"config.eval.single_task_runs has no run of {', '.join(missing)}.")
    return scores


def _resume_point(folders: list[epath.Path]) -> tuple[int, int] | None:
    """(task, step) that the curves go on after; None for a new run."""
    for index, folder in enumerate(folders):
        if not checkpoints.has_committed(folder):
            step = checkpoints.latest_step(folder)
            return (index, step) if index or step else None
    return (len(folders), 0)


def _reflection_target(learner: Learner, frozen: Frozen, trainable: Trainable, task_index: int) -> np.ndarray:
    """The mean attention [T] of a task's dev inputs (without dev, its training inputs) just after learning it."""
    task = learner.stream.tasks[task_index]
    split = task.dev if len(task.dev) else task.train
    weights = learner.attention(frozen, trainable, split, learner.method.slot_index(task_index))
    return weights.mean(axis=0).astype(np.float32)


def _test(
    config: Any,
    learner: Learner,
    frozen: Frozen,
    trainable: Trainable,
    results: epath.Path,
    task_index: int,
    tested: int,
) -> float:
    """The score on task `tested` after training `task_index`, from its predictions file where there is one.

    Unseen tasks are counted on after the last task.
    """
    tasks = learner.stream.tasks + learner.stream.unseen
    names = [task.name for task in tasks]
    if preemption.requested():
        raise preemption.PreemptedError(f"before the test of {names[tested]} after task {names[task_index]}")
    file = predictions_file(results, names, task_index, tested)
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return float(np.mean([json.loads(line)["score"] for line in lines]))
    task = tasks[tested]
    texts, weights = learner.predict(frozen, trainable, task.test, learner.method.slot_index(task_index))
    scores = metrics.score_instances(
        texts, task.task.test, metric=task.task.metric, references=config.eval.references, seed=config.data.seed
    )
    write_predictions(
        results,
        task_order=names,
        task_index=task_index,
        tested_index=tested,
        instances=task.task.test,
        predictions=texts,
        scores=scores,
        attention_weights=weights,
    )
    return float(scores.mean())


def _write_scores(
    config: Any,
    learner: Learner,
    results: epath.Path,
    matrix: np.ndarray,
    frozen: Frozen,
    unseen: dict[str, float],
    single_task_scores: dict[str, float],
) -> dict[str, Any]:
    names = learner.stream.names
    finished = metrics.finished_part(matrix)
    alone = [single_task_scores[name] for name in names[: len(finished)]] if single_task_scores else None
    scores = {
        "method": config.method,
        "task_order": names,
        "metric_per_task": {task.name: task.task.metric for task in learner.stream.tasks},
        "matrix": matrix,
        "summary": metrics.summarise(finished, alone),
        "seeds": {"seed": config.seed, "data.seed": config.data.seed},
        "protocol": _protocol(config),
        "reflection_targets": frozen.targets,
        "buckets": learner.stream.buckets,
        "truncated": learner.stream.truncated(),
        "unseen": unseen,
        "single_task_scores": single_task_scores,
        "config": config,
    }
    categories = {name: category for category, members in SUPERNI_CATEGORIES.items() for name in members}
    if set(names) <= set(categories):
        last = dict(zip(names, finished[-1], strict=False))
        scores["category_scores"] = metrics.mean_by_category(last, categories)
    write_scores(results, **scores)
    return scores
