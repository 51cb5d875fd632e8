"""The pools of pseudo-samples that a run has so far, and what a method sees of them."""

from collections.abc import Sequence

import jax
import numpy as np

from sapt_jax import sharding
from sapt_jax.data.encoding import EncodedSplit
from sapt_jax.data.lesson import Lesson, make_lesson
from sapt_jax.data.pseudo_samples import pool_size
from sapt_jax.data.stream import Stream
from sapt_jax.evaluation import features_of
from sapt_jax.methods.base import Samples
from sapt_jax.run import Run
from sapt_jax.state import Tree

# By task index; the pool of a task that has none yet is not there.
Pools = dict[int, EncodedSplit]


def of_stream(stream: Stream) -> Pools:
    """The pools that are there before a run begins."""
    return {index: task.pseudo for index, task in enumerate(stream.tasks) if task.pseudo is not None}


def rows_kept(pools: Pools, num_tasks: int) -> int:
    """Rows that stand for the first tasks."""
    return sum(len(pools[index]) for index in range(num_tasks) if index in pools)


def lesson(run: Run, pools: Pools, together: Sequence[int]) -> Lesson:
    """What the batches are made of while these tasks are learned."""
    own = {index: run.stream.tasks[index].train for index in together}
    # A writer may have found no sample at all.
    earlier = {index: pools[index] for index in range(together[0]) if len(pools.get(index, ()))}
    return make_lesson(together[-1], own, earlier, run.method.replay, run.method.equal)


def samples(run: Run, base: Tree, pools: Pools, num_tasks: int) -> Samples | None:
    """The features of the first tasks' pseudo-samples, each in its slot's row; None for a method that wants none."""
    if run.method.samples != "inputs":
        return None
    filled = [index for index in range(num_tasks) if len(pools.get(index, ()))]
    found = {run.method.slot_index(index): features_of(run, base, pools[index]) for index in filled}
    width = jax.eval_shape(run.programs.features, base, *_one_input()).shape[-1]
    rows = np.zeros((run.capacity, _largest(run, pools), width), np.float32)
    counts = np.zeros((run.capacity,), np.int32)
    for slot, own in found.items():
        rows[slot, : len(own)], counts[slot] = own, len(own)
    return sharding.replicate(Samples(rows, counts), run.mesh)


def _one_input() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((1, 1), np.int32), jax.ShapeDtypeStruct((1, 1), np.bool_)


def _largest(run: Run, pools: Pools) -> int:
    """Rows of the largest pool that the run will have, so that all tasks share one program."""
    options = run.config.pseudo_samples
    sizes = [len(pool) for pool in pools.values()]
    if options.source == "generate":
        sizes += [pool_size(len(task.train), options.ratio, options.minimum) for task in run.stream.tasks]
    return max(sizes, default=1)
