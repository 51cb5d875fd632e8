"""Teaching a run one more task, from rows at hand."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sapt_jax import continual, state
from sapt_jax.data.sources.own_tasks import as_pair
from sapt_jax.data.stream import order_of
from sapt_jax.data.task import read_instances
from sapt_jax.export.learned import Learned
from sapt_jax.storage import task_folders
from sapt_jax.storage.names import check_name
from sapt_jax.storage.paths import as_path, is_remote
from sapt_jax.storage.text_files import write_text_atomically

Rows = Sequence[Mapping[str, Any]]

_FOLDER, _DEFINITION = "own_tasks", "definition.txt"
# Rows set aside to score a task on, where none are given: one of so many.
_SET_ASIDE = 10


def own_tasks(workdir: str | Path) -> Path:
    """Where the tasks lie that a run was taught from rows."""
    return Path(as_path(workdir)).absolute() / _FOLDER


def teach(
    workdir: Path, name: str, definition: str, rows: Mapping[str, Rows], run: tuple[Learned, Mapping, Callable]
) -> dict[str, Any]:
    """Goes on with a run by one task.

    Args:
      rows: "train", and "test" where there are any to score it on.
      run: what it has learned; its devices, as config.mesh; and what is called before the training begins.

    Returns:
      What scores.json holds.

    Raises:
      ValueError: naming the row or argument at fault, or the run has tasks left to learn; nothing is changed then.
      All that `continual.run` raises.
    """
    learned, sizes, begins = run
    if is_remote(workdir):
        raise ValueError(f"{workdir}: tasks are taught in a local workdir")
    files = _files(name, definition, rows)
    config = _config(workdir, name, learned)
    folder = own_tasks(workdir) / name
    _write(files, folder, begun=task_folders.task_folder(workdir, len(learned.tasks), name).exists())
    config.mesh.update(sizes)
    begins()
    return continual.run(config, workdir)


def _files(name: str, definition: str, rows: Mapping[str, Rows]) -> dict[str, str]:
    """The files of an own task by name."""
    if "," in check_name(name, "name"):
        raise ValueError(f"name={name!r}: config.task_order has commas between its tasks; leave them out")
    if not isinstance(definition, str):
        raise ValueError(f"definition must be a text, not {definition!r:.60}")
    for split, given in rows.items():
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence) or not given:
            raise ValueError(f'{split} must be a list of rows {{"input": ..., "output": ...}}, and not empty')
        # Checked as a run checks them, before anything is written.
        numbered = ((f"{split} row {n}", as_pair(row)) for n, row in enumerate(given))
        read_instances(numbered, prefix=split, on_bad_instance="error", problems=[])
    if "test" not in rows:
        rows = _set_aside(rows["train"])
    files = {f"{split}.jsonl": "".join(map(_line, given)) for split, given in rows.items()}
    return files | {_DEFINITION: definition}


def _set_aside(train: Rows) -> dict[str, Rows]:
    if len(train) < 2:
        raise ValueError("train has one row, of which none can be set aside to score the task on: give more, or test")
    count = max(1, len(train) // _SET_ASIDE)
    chosen = set(state.host_rng(0, "set aside").choice(len(train), count, replace=False).tolist())
    return {
        "train": [row for number, row in enumerate(train) if number not in chosen],
        "test": [row for number, row in enumerate(train) if number in chosen],
    }


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _config(workdir: Path, name: str, learned: Learned) -> ConfigDict:
    """The settings of the run with the task at the end of its order."""
    config = learned.config.copy_and_resolve_references()
    own = own_tasks(workdir)
    if config.own_dir and not own.is_dir():
        raise ValueError(
            f"the run has its own tasks in {config.own_dir} (config.own_dir): put {name} there too, and teach it with "
            "sapt_jax.main"
        )
    config.own_dir = str(own)
    order = order_of(config)
    if name in learned.tasks:
        raise ValueError(f"name={name!r}: the run has learned this task already; choose another name")
    left = [task for task in order if task not in (*learned.tasks, name)]
    if left:
        raise ValueError(f"the run has not learned {', '.join(left)} yet: let sapt_jax.main finish it first")
    config.task_order = ",".join((*learned.tasks, name))
    return config


def _write(files: Mapping[str, str], folder: Path, begun: bool) -> None:
    """Writes the files of a task, which a run that has begun with it must not see change."""
    if begun and any(_read(folder / name) != text for name, text in files.items()):
        raise ValueError(
            f"{folder}: the run has begun to learn this task from other rows; call learn with the same ones"
        )
    for name, text in files.items():
        write_text_atomically(folder / name, text)


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None
