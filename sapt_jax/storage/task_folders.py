"""What of a workdir is a run's own: folders NN-NAME, found by listing, whatever else lies beside them."""

import re
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from sapt_jax.storage.names import check_name
from sapt_jax.storage.paths import as_path

_NUMBERED = re.compile(r"(\d{2,})-(.+)", re.DOTALL)
# What a task's folder holds once the task has begun.
_OF_A_TASK = ("committed", "steps")


def numbered_folders(folder: Path) -> list[tuple[int, str, epath.Path]]:
    """(number, name, folder) of the folders NN-NAME in a folder, in order; what is called otherwise is passed over."""
    place = as_path(folder)
    if not place.is_dir():
        return []
    found = []
    for path in place.iterdir():
        match = _NUMBERED.fullmatch(path.name)
        if match and path.name == f"{int(match[1]):02d}-{match[2]}" and path.is_dir():
            found.append((int(match[1]), match[2], path))
    return sorted(found, key=lambda entry: entry[:2])


def task_folder(workdir: str | Path, task_index: int, name: str) -> epath.Path:
    """WORKDIR/tasks/00-NAME; raises ValueError for a name that cannot be a folder's."""
    return as_path(workdir) / "tasks" / f"{task_index:02d}-{check_name(name, 'task')}"


def begun_tasks(workdir: str | Path) -> list[tuple[int, str, epath.Path]]:
    """(index, name, folder) of the tasks that a run has begun or learned, in order."""
    folders = numbered_folders(as_path(workdir) / "tasks")
    return [entry for entry in folders if any((entry[2] / part).is_dir() for part in _OF_A_TASK)]


def check_order(workdir: str | Path, names: Sequence[str]) -> None:
    """Checks that the tasks which this workdir already holds are the first of `names`, in order.

    Raises:
      ValueError: naming the first task that differs.
    """
    for index, name, folder in begun_tasks(workdir):
        if index >= len(names) or names[index] != name:
            now = names[index] if index < len(names) else "nothing"
            raise ValueError(
                f"{folder}: task {index + 1} of this run is {name}, but config.task_order has {now} there. New "
                "tasks go at the end of the order; for another order use a new --workdir."
            )
