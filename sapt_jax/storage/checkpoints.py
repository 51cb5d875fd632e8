"""Orbax checkpoints: one folder for each task.

    WORKDIR/tasks/00-NAME/steps/K/{latest,best,loop}   while the task trains; two steps are kept
    WORKDIR/tasks/00-NAME/committed/                   after it: bank, memory, the trainable tree, and a format number

Both are written beside their place and renamed, or in an object store closed with a file of their own, so that a killed
run finds either the old or the new one. Should the newer of two steps be damaged all the same, the older is taken.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint import args as ocp_args

from sapt_jax.state import TASKS, Frozen, Trainable, TrainState, is_leaf
from sapt_jax.storage.costs import Costs
from sapt_jax.storage.paths import as_path, is_remote
from sapt_jax.storage.task_folders import begun_tasks

FORMAT = 2
# Beside the arrays of a checkpoint.
_SMALL_FILES = 2**16
_FORMAT = "['format']"
_LAST_FILE = "commit_success.txt"
# Names of format 1, which had SAPT's own fields in the two trees: ours -> theirs, by regular expression.
_FORMAT_1 = (
    (r"\['memory'\]\['keys'\]", "['keys']"),
    (r"\['memory'\]\['reflection_targets'\]", "['targets']"),
    (r"\['trainable'\]\.selector\['key'\]", "['trainable'].key"),
    (r"(\['trainable'\])\.selector\['query_projection'\](\['(?:up|down)'\])\['kernel'\]", r"\1.query_projection\2"),
    (r"(\['trainable'\])\.selector\['query_projection'\]\['norm'\](.*)", r"\1.query_projection\2"),
    (r"(.*\['(?:en|de)coder'\])\['layers'\](.*)", r"\1\2"),
)
# Of format 1 alone: what sequential LoRA kept without need.
_LEFT_BEHIND = re.compile(r"\['(keys|targets)'\]|\['trainable'\]\.(key|query_projection.*)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Where `fit` stands in a task.

    Attributes:
      step: updates done.
      best_step, best_score: of the best evaluation on dev so far; -1 and None before the first.
      stale: evaluations since then.
      finished: the task needs no more updates.
      buckets: batch shapes of the task, kept while it trains, also where a longer order would choose others.
      spent: on the task up to here, over all calls.
    """

    step: int = 0
    best_step: int = -1
    best_score: float | None = None
    stale: int = 0
    finished: bool = False
    buckets: tuple[tuple[int, int], ...] = ()
    spent: Costs = Costs()


class DamagedError(ValueError):
    """A checkpoint that lacks a part, or holds a broken one."""


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, as a restore target."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class TaskCheckpoints:
    """The checkpoints of one task in training: the latest state, and the best trainable tree so far."""

    def __init__(self, folder: Path):
        self._folder = _absolute(folder) / "steps"
        self._manager = ocp.CheckpointManager(
            _plain_path(self._folder),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, create=True, temporary_path_class=_way_of_finishing(self._folder)
            ),
            item_names=("latest", "best", "loop"),
        )

    def save(self, state: TrainState, best: Trainable, loop: Loop) -> None:
        """Saves in the background. The arrays are copied first: the next step donates their buffers."""
        state, best = jax.tree.map(lambda x: x.copy(), (state, best))
        with _full_disk_told(self._folder, (state, best)):
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

        A step that is damaged is told of and goes, and the one before it is taken.

        Args:
          state: arrays, or what stands for them.

        Raises:
          ValueError: lists every array that is missing, unexpected or of another shape or dtype.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, state)
            except DamagedError as error:
                logging.getLogger(__name__).warning("%s The task goes on from the step before, if there is one.", error)
                self._manager.delete(step)
        return None

    def _restore(self, step: int, state: TrainState) -> tuple[TrainState, Trainable, Loop]:
        where = self._folder / str(step)
        latest, best = abstract_like(state), abstract_like(state.trainable)
        stored = _stored(where / "latest", whole=True)
        if any(name.startswith(".trainable.key") for name in stored):
            raise ValueError(
                f"{where} was left in the middle of a task by an older version of sapt_jax, and this one cannot go on "
                f"from there: delete {self._folder}, and the task starts anew. Tasks that it finished are kept."
            )
        _check(where / "latest", stored, _plain(latest))
        _check(where / "best", _stored(where / "best", whole=True), _plain(best))
        with _damage_told(where):
            json.loads((where / "loop" / "metadata").read_text())
            restored = self._manager.restore(
                step,
                args=ocp_args.Composite(
                    latest=ocp_args.StandardRestore(_plain(latest)),
                    best=ocp_args.StandardRestore(_plain(best)),
                    loop=ocp_args.JsonRestore(),
                ),
            )
            loop = restored["loop"]
            plain = {"buckets": tuple(map(tuple, loop["buckets"])), "spent": Costs(**loop.get("spent", {}))}
            return (
                _like(state, restored["latest"]),
                _like(state.trainable, restored["best"]),
                Loop(**{**loop, **plain}),
            )

    def __enter__(self) -> "TaskCheckpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Waits for pending saves."""
        with _full_disk_told(self._folder, ()):
            self._manager.wait_until_finished()
            self._manager.close()


def committed(frozen: Frozen, trainable: Trainable) -> dict[str, Any]:
    """What a committed task's checkpoint holds: all but the pretrained model, and but what the config says."""
    return {"bank": frozen.bank, "memory": frozen.memory, "trainable": trainable}


def latest_step(folder: Path) -> int:
    """The step of the latest checkpoint of a task in training, 0 where there is none."""
    steps = as_path(folder) / "steps"
    found = steps.iterdir() if steps.is_dir() else ()
    return max((int(path.name) for path in found if path.name.isdecimal() and _is_finished(path)), default=0)


def has_committed(folder: Path) -> bool:
    """Whether the task in this folder was committed."""
    return _is_finished(as_path(folder) / "committed")


def committed_folders(workdir: Path) -> list[epath.Path]:
    """The folders of the committed tasks, in order."""
    return [folder for _, _, folder in begun_tasks(workdir) if has_committed(folder)]


def saved_capacity(folder: Path, declared: Frozen) -> int:
    """The number of slots in the bank that a committed task's checkpoint holds.

    Args:
      declared: the frozen tree's leaves, at any capacity.

    Raises:
      ValueError: the checkpoint is of other blocks.
    """
    path, leaf = jax.tree_util.tree_leaves_with_path({"bank": declared.bank}, is_leaf=is_leaf)[0]
    where = _absolute(folder) / "committed"
    found = _stored(where)
    name = _stored_name(jax.tree_util.keystr(path), found)
    if name not in found:
        raise ValueError(f"{where} lacks {name}, which the blocks of this run's model and config have.")
    return found[name].shape[leaf.axes.index(TASKS)]


def save_committed(folder: Path, frozen: Frozen, trainable: Trainable) -> None:
    """Saves the state after a task; returns when it is on disk."""
    where = _absolute(folder) / "committed"
    tree = _plain(committed(frozen, trainable)) | {_FORMAT: jnp.asarray(FORMAT, jnp.int32)}
    with (
        _full_disk_told(where, tree),
        ocp.StandardCheckpointer(temporary_path_class=_way_of_finishing(where)) as checkpointer,
    ):
        checkpointer.save(_plain_path(where), tree)


def load_committed(folder: Path, frozen: Frozen, trainable: Trainable) -> tuple[Frozen, Trainable]:
    """Restores the state after a task into the shapes and shardings of the given trees.

    Raises:
      ValueError: lists every array that is missing, unexpected or of another shape or dtype; or another version wrote
        the checkpoint.
    """
    where = _absolute(folder) / "committed"
    wanted = abstract_like(committed(frozen, trainable))
    stored = _stored(where, whole=True)
    plain = _plain(wanted)
    written = _written_format(where, stored)
    if written > FORMAT:
        raise ValueError(
            f"{where} was written in format {written}, this version of sapt_jax reads up to {FORMAT}: take a newer one."
        )
    # What each array is called in the checkpoint.
    names = {name: _stored_name(name, stored) for name in plain}
    targets = {names[name]: target for name, target in plain.items()}
    known = {name for name in stored if name not in targets and _is_known(name, stored)}
    _check(where, {name: x for name, x in stored.items() if name not in known}, targets)
    found = _restore(where, targets, ocp.checkpoint_utils.construct_restore_args(targets))
    tree = _like(wanted, {name: found[names[name]] for name in plain})
    return frozen.replace(bank=tree["bank"], memory=tree["memory"]), tree["trainable"]


def _stored_name(name: str, stored: Collection[str]) -> str:
    """What an array is called in a committed task's checkpoint that holds these."""
    if _FORMAT in stored:
        return name
    for ours, theirs in _FORMAT_1:
        if re.fullmatch(ours, name):
            name = re.sub(ours, theirs, name)
    return name


def _is_known(name: str, stored: dict[str, Any]) -> bool:
    """Whether an array that this run has no use for may be in a checkpoint."""
    return name == _FORMAT or (_FORMAT not in stored and _LEFT_BEHIND.fullmatch(name) is not None)


def _written_format(where: epath.Path, stored: Collection[str]) -> int:
    if _FORMAT not in stored:
        return 1
    found = _restore(where, {_FORMAT: 0}, {_FORMAT: ocp.RestoreArgs(restore_type=np.ndarray)})
    return int(found[_FORMAT])


def _restore(where: epath.Path, targets: dict[str, Any], restore_args: dict[str, Any]) -> dict[str, Any]:
    """These arrays of a checkpoint, whatever else is in it."""
    arguments = ocp_args.PyTreeRestore(item=targets, restore_args=restore_args, partial_restore=True)
    with _damage_told(where), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(_plain_path(where), args=arguments)


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


def _stored(where: epath.Path, whole: bool = False) -> dict[str, Any]:
    """What a tree's checkpoint says of its arrays, by name.

    Args:
      whole: looks at their values, too, so that what can be read of it can be restored.
    """
    with _damage_told(where):
        _look(where, whole)
        with ocp.StandardCheckpointer() as checkpointer:
            return dict(checkpointer.metadata(_plain_path(where)).item_metadata.tree)


def _look(where: epath.Path, whole: bool) -> None:
    """Reads a tree's checkpoint before Orbax does, which prints the stack of whatever it stumbles over."""
    json.loads((where / "_METADATA").read_text())["tree_metadata"]
    place = os.fspath(_plain_path(where))
    base = place if is_remote(where) else f"file://{urllib.parse.quote(place)}"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{base}/"}).result()
    for name in store.list().result():
        if whole and store.read(name).result().state != "value":
            raise ValueError(f"{name} is gone")


@contextlib.contextmanager
def _damage_told(where: epath.Path) -> Iterator[None]:
    """Whatever a library says of a checkpoint that it cannot read becomes one line that names the folder."""
    try:
        yield
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        lines = str(error).strip().split("\n")
        logging.getLogger(__name__).info("%s", error, exc_info=True)
        raise DamagedError(
            f"{where} lacks a part of the checkpoint, or holds a broken one ({type(error).__name__}: {lines[0]:.200}). "
            "Put a whole copy back, or delete this folder, and the same command learns anew what is missing."
        ) from None


@contextlib.contextmanager
def _full_disk_told(where: epath.Path, trees: Any) -> Iterator[None]:
    """Looks for room before Orbax writes, which prints a stack for each of its threads when there is none."""
    message = "No space left on the disk. What was saved is whole: make room, and the same command goes on"
    full = OSError(errno.ENOSPC, message, os.fspath(where))
    needed = sum(x.nbytes for x in jax.tree.leaves(trees) if isinstance(x, jax.Array))
    if not is_remote(where):
        there = next(parent for parent in (where, *where.parents) if parent.exists())
        if shutil.disk_usage(there).free < needed + _SMALL_FILES:
            raise full
    try:
        yield
    except Exception as error:
        if any(told in str(error) for told in ("No space left", "ENOSPC", "Disk quota exceeded")):
            raise full from None
        raise


def _plain_path(folder: epath.Path) -> epath.Path:
    """The folder for Orbax, which takes brackets and the like in a path for a pattern: by a link without them."""
    if is_remote(folder) or not re.search(r"[][*?\\]", os.fspath(folder)):
        return folder
    link = Path(_links().name) / hashlib.sha256(os.fspath(folder.parent).encode()).hexdigest()
    if not link.is_symlink():
        folder.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.parent)
    return epath.Path(link) / folder.name


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="sapt-jax-")


def _check(where: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
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
