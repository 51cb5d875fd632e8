"""What the inputs of a run's tasks are asked with: WORKDIR/instructions.json, for those who ask it without its data."""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from etils import epath

from sapt_jax.data.task import Task, read_json
from sapt_jax.storage.text_files import write_text_atomically

_FILE = "instructions.json"


class Instruction(NamedTuple):
    """A task's definition, and the template of `prompts.TEMPLATES` that puts it before an input."""

    definition: str
    template: str


def write_instructions(workdir: epath.Path, tasks: Iterable[Task]) -> None:
    """Writes the instructions of these tasks; on several hosts process 0 does."""
    told = {task.name: Instruction(task.definition, task.prompt)._asdict() for task in tasks}
    if jax.process_index() == 0:
        write_text_atomically(workdir / _FILE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def read_instructions(workdir: epath.Path) -> Mapping[str, Instruction]:
    """The instructions by task; none where the run has not written them, as one of an older version.

    Raises:
      ValueError: the file is broken.
    """
    file = workdir / _FILE
    if not file.is_file():
        return {}
    try:
        return {name: Instruction(**fields) for name, fields in read_json(file).items()}
    except (AttributeError, TypeError):
        raise ValueError(
            f"{file} does not hold the instructions of a run; start the run again, and it is written anew"
        ) from None
