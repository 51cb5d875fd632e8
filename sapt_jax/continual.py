"""The task sequence: open a slot, fit, measure the reflection target, commit, save, test; resumable at every step."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from sapt_jax import checkpoints, metrics, partitioning, run_log, terminal
from sapt_jax.config import check_config, check_same_run
from sapt_jax.data.benchmarks import SUPERNI_CATEGORIES
from sapt_jax.fit import fit
from sapt_jax.learner import Learner, build
from sapt_jax.state import Frozen, Trainable, commit

commit_task = jax.jit(commit)


def run(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Teaches a model a sequence of tasks, or goes on where an earlier call with this workdir stopped.

    Returns:
      What `scores.json` holds.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault, before anything is changed.
    """
    workdir = Path(workdir)
    check_config(config)
    mesh = partitioning.make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(partitioning.RULES):
        learner, frozen = build(config, mesh)
        check_same_run(config, workdir)
        return _run_tasks(config, learner, frozen, workdir)


def _run_tasks(config: Any, learner: Learner, frozen: Frozen, workdir: Path) -> dict[str, Any]:
    names = learner.stream.names
    folders = [checkpoints.task_folder(workdir, index, name) for index, name in enumerate(names)]
    trainable = None
    matrix = metrics.empty_matrix(len(names))
    console = terminal.make_console()
    with run_log.RunLog(workdir, resume_from=_resume_point(folders)) as log:
        for index, folder in enumerate(folders):
            slot = learner.method.slot_index(index)
            fresh = learner.open_task(config.seed, index, trainable)
            if checkpoints.has_committed(folder):
                frozen, trainable = checkpoints.load_committed(folder, frozen, fresh)
            else:
                trainable = fit(config, learner, frozen, fresh, index, folder, log, console)
                frozen = commit_task(frozen, trainable, _reflection_target(learner, frozen, trainable, index), slot)
                checkpoints.save_committed(folder, frozen, trainable)
            row = [_test(config, learner, frozen, trainable, workdir, index, tested) for tested in range(index + 1)]
            matrix = metrics.with_row(matrix, index, row)
            log.log("scores", task_index=index, task=names[index], step=0, scores=row)
            scores = _write_scores(config, learner, workdir, matrix, frozen)
            console.print(
                terminal.score_table(
                    matrix, names, scores["metric_per_task"], title=f"Scores, {config.method}", width=console.width
                )
            )
    places = {
        "scores": workdir / "scores.json",
        "predictions": workdir / "predictions",
        "curves": workdir / "tensorboard",
    }
    console.print(terminal.closing_summary(scores["summary"], places, scores["protocol"]))
    return scores


def _resume_point(folders: list[Path]) -> tuple[int, int] | None:
    """(task, step) that the curves go on after; None for a new run."""
    for index, folder in enumerate(folders):
        if not checkpoints.has_committed(folder):
            step = checkpoints.latest_step(folder)
            return (index, step) if index or step else None
    return (len(folders), 0)


def _reflection_target(learner: Learner, frozen: Frozen, trainable: Trainable, task_index: int) -> jax.Array:
    """The mean attention [T] of a task's dev inputs (without dev, its training inputs) just after learning it."""
    task = learner.stream.tasks[task_index]
    split = task.dev if len(task.dev) else task.train
    weights = learner.attention(frozen, trainable, split, learner.method.slot_index(task_index))
    return partitioning.replicate(weights.mean(axis=0).astype(np.float32), learner.mesh)


def _test(
    config: Any, learner: Learner, frozen: Frozen, trainable: Trainable, workdir: Path, task_index: int, tested: int
) -> float:
    """The score on task `tested` after training `task_index`, from its predictions file where there is one."""
    names = learner.stream.names
    file = run_log.predictions_file(workdir, names, task_index, tested)
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        return float(np.mean([json.loads(line)["score"] for line in lines]))
    task = learner.stream.tasks[tested]
    texts, weights = learner.predict(frozen, trainable, task.test, learner.method.slot_index(task_index))
    scores = metrics.score_instances(
        texts, task.task.test, metric=task.task.metric, references=config.eval.references, seed=config.data.seed
    )
    run_log.write_predictions(
        workdir,
        task_order=names,
        task_index=task_index,
        tested_index=tested,
        instances=task.task.test,
        predictions=texts,
        scores=scores,
        attention_weights=weights,
    )
    return float(scores.mean())


def _write_scores(config: Any, learner: Learner, workdir: Path, matrix: np.ndarray, frozen: Frozen) -> dict[str, Any]:
    names = learner.stream.names
    summary = metrics.summarise(metrics.finished_part(matrix), None)
    extra = {"reflection_targets": frozen.targets, "buckets": learner.stream.buckets}
    categories = {name: category for category, members in SUPERNI_CATEGORIES.items() for name in members}
    if set(names) <= set(categories):
        last = dict(zip(names, metrics.finished_part(matrix)[-1], strict=False))
        extra["category_scores"] = metrics.mean_by_category(last, categories)
    run_log.write_scores(
        workdir,
        method=config.method,
        task_order=names,
        metric_per_task={task.name: task.task.metric for task in learner.stream.tasks},
        matrix=matrix,
        summary=summary,
        seeds={"seed": config.seed, "data.seed": config.data.seed},
        protocol={
            "dev_is_test": config.data.dev_is_test,
            "pool_padding": config.attention.pool_padding,
            "truncation": config.data.truncation,
            "references": config.eval.references,
            "max_new_tokens": config.eval.max_new_tokens,
        },
        config=config,
        **extra,
    )
    return run_log.read_scores(workdir)
