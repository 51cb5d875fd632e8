"""The story of a run, told once: tasks come in turn; each is begun, fitted, measured, ended, saved, tested and told."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sapt_jax import sharding, state
from sapt_jax.config import (
    check_config,
    flatten,
    make_method,
    protocol_of,
)
from sapt_jax.contents import contents_of
from sapt_jax.data.stream import disabled_of, order_of, split_names
from sapt_jax.evaluation import check_stored, features_of, general_loss, test
from sapt_jax.fit import fit
from sapt_jax.methods.base import Samples, Seen
from sapt_jax.passes import gather, sum_batches
from sapt_jax.pseudo_samples import pools
from sapt_jax.pseudo_samples.writer import make_writer, write_pool
from sapt_jax.recorded_config import (
    check_same_contents,
    check_same_run,
    record_config,
    record_contents,
    upgrade,
)
from sapt_jax.results.references import References, Terms, read_joint_scores, read_single_task_scores
from sapt_jax.run import Run, open_run
from sapt_jax.state import Frozen, Trainable, Tree
from sapt_jax.storage import checkpoints, lock, task_folders
from sapt_jax.storage.compiled import keep_programs
from sapt_jax.storage.costs import Meter, forget_peak, write_costs
from sapt_jax.storage.paths import as_path
from sapt_jax.tell import Beside, Tale, Tests


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Teaches a model a sequence of tasks, or goes on where an earlier call with this workdir stopped.

    Args:
      workdir: a local folder, or a path of file:///, gs:// or s3://.

    Returns:
      What `scores.json` holds.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault, before anything is changed.
      PreemptedError: the run was asked to stop (`preemption`); the same call goes on.
      FloatingPointError: a step was not finite; see `fit`.
    """
    workdir = as_path(workdir)
    check_config(config)
    keep_programs(config.compilation_cache)
    with lock.hold(workdir):
        return _run(config, workdir)


def _run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    check_same_run(config, workdir)
    names = order_of(config)
    task_folders.check_order(workdir, names)
    disabled = _disabled_tasks(config, names, workdir)
    references = _references(config, names)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(config.mesh.rules)):
        with open_run(config, workdir, mesh) as (own, base):
            contents, results = contents_of(own, base), _results(config, workdir, disabled)
            check_same_contents(contents, config, workdir)
            check_stored(own, results)
            record_config(config, workdir)
            record_contents(contents, workdir)
            frozen = own.empty(base, own.capacity, disabled)
            return _teach(own, frozen, Tale(own, results, references))


def _teach(run: Run, frozen: Frozen, tale: Tale) -> dict[str, Any]:
    tasks, last = run.stream.tasks, len(run.stream.tasks) - 1
    pool = pools.of_stream(run.stream)
    writer = make_writer(run) if run.config.pseudo_samples.source == "generate" and run.method.samples else None
    trainable, told = None, {}
    tale.opening()
    for together in run.method.lessons(len(tasks)):
        index = together[-1]
        if checkpoints.has_committed(run.folder(index)):
            # It was learned in an earlier call.
            frozen, trainable = _load(run, frozen, index)
        else:
            # Begin and fit.
            forget_peak()
            meter = Meter()
            lesson, samples = pools.lesson(run, pool, together), pools.samples(run, frozen.base, pool, index)
            begin = functools.partial(_begin, run, frozen, trainable, samples, index)
            trainable, before = fit(run, frozen, begin, lesson, samples)
            # Measure, end, save.
            found = _measure_after(run, (frozen, trainable), index)
            frozen = _end(run, frozen, trainable, found, index)
            write_costs(run.folder(index), before + meter.read())
            checkpoints.save_committed(run.folder(index), frozen, trainable)
        # Test and tell.
        row = [test(run, (frozen, trainable), tale.results, index, tested) for tested in range(index + 1)]
        beside = _test_beside(run, (frozen, trainable), tale.results) if index == last else Beside()
        told = tale.after_tasks(together, Tests(row, beside), pool, frozen)
        # Write samples for the tasks to come; the last needs none until a longer order goes on from it.
        if writer and index < last:
            pool[index] = write_pool(run, writer, (frozen, trainable), index)
    tale.closing(told)
    return told


# --- Begin ------------------------------------------------------------------------------------------------------------


def _begin(run: Run, frozen: Frozen, previous: Trainable | None, samples: Samples | None, index: int) -> Trainable:
    """What a task starts from."""
    seen = Seen(_feature_rows(run, frozen.base, index), None, samples)
    start = run.programs.begin_task(frozen, previous, seen, run.task(index))
    if run.method.pass_before is None:
        return start
    totals = _totals(run, (frozen, start), index, run.method.pass_before)
    seen = seen.replace(found=_found(run, frozen, totals, "summarise_before"))
    return run.programs.begin_task(frozen, previous, seen, run.task(index))


def _feature_rows(run: Run, base: Tree, index: int) -> jax.Array | None:
    """Features of the training inputs that the method asks for: a fixed number, so that tasks share one program."""
    if not run.method.rows_before:
        return None
    features = features_of(run, base, run.stream.tasks[index].train)
    rng = state.host_rng(run.config.seed, "feature rows", index)
    return sharding.replicate(features[rng.integers(len(features), size=run.method.rows_before)], run.mesh)


# --- Measure ----------------------------------------------------------------------------------------------------------


def _measure_after(run: Run, trees: tuple[Frozen, Trainable], index: int) -> Tree | None:
    """What the method finds in a task that was just learned."""
    if not run.method.pass_after:
        return None
    totals = _totals(run, trees, index, run.method.pass_after, run.method.rows_after)
    if run.method.features_after:
        totals["features"] = features_of(run, trees[0].base, run.stream.tasks[index].train)
    return _found(run, trees[0], totals, "summarise")


def _totals(run: Run, trees: tuple[Frozen, Trainable], index: int, split: str, most: int = 0) -> Tree:
    """What the method adds up in one pass over a split of a task; without dev, over its training rows.

    Args:
      most: rows of it, at most; 0 is all.
    """
    task = run.stream.tasks[index]
    rows = getattr(task, split) if len(getattr(task, split)) else task.train
    if 0 < most < len(rows):
        rng = state.host_rng(run.config.seed, "measured rows", index)
        rows = rows.take(np.sort(rng.choice(len(rows), most, replace=False)))
    at = run.task(index)
    return sum_batches(lambda batch: run.programs.measure(*trees, batch, at), rows, run.layout, run.mesh)


def _found(run: Run, frozen: Frozen, totals: Tree, hook: str) -> Tree:
    """What the method makes, by its hook `summarise` or `summarise_before`, of what was added up; on every device."""
    memory = jax.tree.map(gather, frozen.memory) if run.method.uses(hook) else None
    found = getattr(run.method, hook)(memory, totals)
    return sharding.replicate(jax.tree.map(lambda x: np.asarray(x, np.float32), found), run.mesh)


# --- End, save, load --------------------------------------------------------------------------------------------------


def _end(run: Run, frozen: Frozen, trainable: Trainable, found: Tree | None, index: int) -> Frozen:
    """What a task leaves. The base stays out: a program's results are new arrays."""
    after = run.programs.end_task(frozen.replace(base=None), trainable, found, run.task(index))
    return after.replace(base=frozen.base, enabled=frozen.enabled)


def _load(run: Run, frozen: Frozen, index: int) -> tuple[Frozen, Trainable]:
    """The trees after a task that was ended before, in a bank of today's capacity."""
    folder, declared = run.folder(index), run.frozen_leaves(run.capacity)
    stored = run.frozen_leaves(checkpoints.saved_capacity(folder, declared))
    like = sharding.abstract((stored, run.trainable_leaves), run.mesh)
    saved, trainable = checkpoints.load_committed(folder, *like)
    saved = saved.replace(enabled=frozen.enabled[: stored.enabled.shape[0]])
    grown = sharding.place(state.grow(saved, declared), declared, run.mesh)
    return grown.replace(base=frozen.base, enabled=frozen.enabled), trainable


# --- Test -------------------------------------------------------------------------------------------------------------


def _test_beside(run: Run, trees: tuple[Frozen, Trainable], results: epath.Path) -> Beside:
    """After the last task: scores on those that were never trained on, and what became of general ability."""
    count = len(run.stream.tasks)
    unseen = {
        task.name: test(run, trees, results, count - 1, count + number).score
        for number, task in enumerate(run.stream.unseen)
    }
    if run.stream.general is None:
        return Beside(unseen)
    at = run.task(count - 1)
    return Beside(unseen, (general_loss(run, (trees[0], None), at), general_loss(run, trees, at)))


# --- Before anything is changed ---------------------------------------------------------------------------------------


def _disabled_tasks(config: ConfigDict, names: tuple[str, ...], workdir: epath.Path) -> tuple[str, ...]:
    disabled, method = disabled_of(config), make_method(config)
    for name in disabled:
        if name not in names:
            raise ValueError(f"config.disabled_tasks names {name}, which is not in config.task_order.")
        index = names.index(name)
        if [method.slot_index(other) for other in range(len(names))].count(method.slot_index(index)) > 1:
            raise ValueError(
                f"config.disabled_tasks names {name}, but with config.method={config.method!r} tasks share a block: "
                "none of them can be withdrawn."
            )
        if not checkpoints.has_committed(task_folders.task_folder(workdir, index, name)):
            raise ValueError(
                f"config.disabled_tasks names {name}, which this run has not learned: take it out of the order."
            )
    return disabled


def _results(config: ConfigDict, workdir: epath.Path, disabled: tuple[str, ...]) -> epath.Path:
    """Where scores and predictions go: those of another way to test lie beside what a run finds, not over it."""
    ways = [f"without-{'-'.join(disabled)}"] if disabled else []
    ways += ["oracle"] if config.eval.routing == "oracle" else []
    return workdir / "-".join(ways) if ways else workdir


def _references(config: ConfigDict, names: tuple[str, ...]) -> References:
    # How a method answers is its own, and a run of one task has none to withdraw; what is asked must be the same.
    own = (f"{config.method}.", "needs_task_id", "disabled_tasks", "eval.routing")
    protocol = {name: value for name, value in protocol_of(config).items() if not name.startswith(own)}
    terms, options = Terms(protocol, lambda written: upgrade(flatten(written))), config.eval
    references = References(
        single=read_single_task_scores(split_names(options.single_task_runs), terms),
        joint=read_joint_scores(options.joint_run, terms) if options.joint_run else {},
    )
    for setting, scores in (("single_task_runs", references.single), ("joint_run", references.joint)):
        missing = [name for name in names if name not in scores]
        if options[setting] and missing:
            raise ValueError(f"config.eval.{setting} has no score of {', '.join(missing)}.")
    return references
