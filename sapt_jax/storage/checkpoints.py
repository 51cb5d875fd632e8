"""Orbax checkpoints: one folder for each task.

    WORKDIR/tasks/00-NAME/steps/K/{latest,best,loop}   while the task trains; one step is kept
    WORKDIR/tasks/00-NAME/committed/                   after it: bank, keys, targets and the trainable tree

Both are written beside their place and renamed, or in an object store closed with a file of their own, so that a killed
run finds either the old or the new one.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import args as ocp_args

from sapt_jax.programs import TrainState
from sapt_jax.state import Frozen, Trainable
from sapt_jax.storage.paths import as_path, is_remote

_LAST_FILE = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Loop:
    """Where `fit` stands in a task.

    Attributes:
      step: updates done.
      best_step, best_score: of the best evaluation on dev so far; -1 and None before the first.
      stale: evaluations since then.
      finished: the task needs no more updates.
      buckets: batch shapes of the task, kept while it trains, also where a longer order would choose others.
    """

    step: int = 0
    best_step: int = -1
    best_score: float | None = None
    stale: int = 0
    finished: bool = False
    buckets: tuple[tuple[int, int], ...] = ()


def task_folder(workdir: str | Path, task_index: int, name: str) -> epath.Path:
    """WORKDIR/tasks/00-NAME."""
    return as_path(workdir) / "tasks" / f"{task_index:02d}-{name}"


def check_order(workdir: Path, names: Sequence[str]) -> None:
    """Checks that the tasks which this workdir already holds are the first of `names`, in order.

    Raises:
      ValueError: naming the first task that differs.
    """
    for folder in sorted((as_path(workdir) / "tasks").glob("*-*")):
        number, name = folder.name.split("-", 1)
        index = int(number)
        if index >= len(names) or names[index] != name:
            now = names[index] if index < len(names) else "nothing"
            raise ValueError(
                f"{folder}: task {index + 1} of this run is {name}, but config.task_order has {now} there. New "
                "tasks go at the end of the order; for another order use a new --workdir."
            )


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, as a restore target."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class TaskCheckpoints:
    """The checkpoints of one task in training: the latest state, and the best trainable tree so far."""

    def __init__(self, folder: Path):
        self._folder = _absolute(folder) / "steps"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, create=True, temporary_path_class=_way_of_finishing(self._folder)
            ),
            item_names=("latest", "best", "loop"),
        )

    def save(self, state: TrainState, best: Trainable, loop: Loop) -> None:
        """Saves in the background. The arrays are copied first: the next step donates their buffers."""
        state, best = jax.tree.map(lambda x: x.copy(), (state, best))
        self._manager.save(
            loop.step,
            args=ocp_args.Composite(
                latest=ocp_args.StandardSave(_plain(state)),
                best=ocp_args.StandardSave(_plain(best)),
                loop=ocp_args.JsonSave(dataclasses.asdict(loop)),
            ),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, Trainable, Loop] | None:
        """The saved (state, best, loop) in the shapes and shardings of `state`, or None where nothing was saved.

        Raises:
          ValueError: lists every array that is missing, unexpected or of another shape or dtype.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = self._folder / str(step)
        latest, best = abstract_like(state), abstract_like(state.trainable)
        _check(where / "latest", latest)
        _check(where / "best", best)
        restored = self._manager.restore(
            step,
            args=ocp_args.Composite(
                latest=ocp_args.StandardRestore(_plain(latest)),
                best=ocp_args.StandardRestore(_plain(best)),
                loop=ocp_args.JsonRestore(),
            ),
        )
        return (
            _like(state, restored["latest"]),
            _like(state.trainable, restored["best"]),
            Loop(**{**restored["loop"], "buckets": tuple(map(tuple, restored["loop"]["buckets"]))}),
        )

    def close(self) -> None:
        """Waits for pending saves."""
        self._manager.wait_until_finished()
        self._manager.close()


def committed(frozen: Frozen, trainable: Trainable) -> dict[str, Any]:
    """What a committed task's checkpoint holds: all but the pretrained model, and but what the config says."""
    return {"bank": frozen.bank, "keys": frozen.keys, "targets": frozen.targets, "trainable": trainable}


def latest_step(folder: Path) -> int:
    """The step of the latest checkpoint of a task in training, 0 where there is none."""
    steps = as_path(folder) / "steps"
    return max((int(path.name) for path in steps.glob("*") if path.name.isdigit() and _is_finished(path)), default=0)


def has_committed(folder: Path) -> bool:
    """Whether the task in this folder was committed."""
    return _is_finished(as_path(folder) / "committed")


def saved_capacity(folder: Path) -> int:
    """The number of slots in the bank that a committed task's checkpoint holds."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(_absolute(folder) / "committed").item_metadata.tree
    return tree["['keys']"].shape[0]


def save_committed(folder: Path, frozen: Frozen, trainable: Trainable) -> None:
    """Saves the state after a task; returns when it is on disk."""
    where = _absolute(folder) / "committed"
    with ocp.StandardCheckpointer(temporary_path_class=_way_of_finishing(where)) as checkpointer:
        checkpointer.save(where, _plain(committed(frozen, trainable)))


def load_committed(folder: Path, frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
    """Restores the state after a task into the shapes and shardings of the given trees.

    Raises:
      ValueError: lists every array that is missing, unexpected or of another shape or dtype.
    """
    where = _absolute(folder) / "committed"
    wanted = abstract_like(committed(frozen, trainable))
    _check(where, wanted)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = _like(wanted, checkpointer.restore(where, _plain(wanted)))
    frozen = frozen.replace(bank=tree["bank"], keys=tree["keys"], targets=tree["targets"])
    return frozen, tree["trainable"]


def _absolute(folder: str | Path) -> epath.Path:
    path = as_path(folder)
    return path if is_remote(path) else path.absolute()


def _is_finished(checkpoint: epath.Path) -> bool:
    return (checkpoint / _LAST_FILE).is_file() if is_remote(checkpoint) else checkpoint.is_dir()


def _way_of_finishing(path: epath.Path) -> Any:
    """How Orbax marks a checkpoint as whole. Its default renames on S3, too, where that copies file by file."""
    return ocp.path.atomicity.CommitFileTemporaryPath if is_remote(path) else None


def _plain(tree: Any) -> Any:
    """Leaves by their path's text: Orbax's restore then depends on no class of ours or of optax."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree: Any, plain: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: plain[jax.tree_util.keystr(path)], tree)


def _check(where: Path, wanted: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        found = dict(checkpointer.metadata(where).item_metadata.tree)
    expected = _plain(wanted)
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        saved, ours = (
            (tuple(found[name].shape), str(found[name].dtype)),
            (expected[name].shape, str(expected[name].dtype)),
        )
        if saved != ours:
            problems.append(f"{name}: the checkpoint has {saved[1]}{list(saved[0])}, this run {ours[1]}{list(ours[0])}")
    if problems:
        raise ValueError(
            f"{where} does not fit this run's model and config. Use the config that wrote it, or a new --workdir.\n  "
            + "\n  ".join(sorted(problems))
        )
