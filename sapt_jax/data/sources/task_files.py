"""Readers of the two public file formats: a folder in the CL_Benchmark layout and natural-instructions files.

CL_Benchmark: `{root}/{SuperNI|Long_Sequence}/{task}/{train,test}.json`, one object with "Definition" (a list
of at most one string) and "Instances" ({"input", "output": str or list of str, optional "id"}).
natural-instructions: one such object for the whole task, `tasks/{task}.json`, cut here into train, dev and
test.
"""

import dataclasses
import difflib
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapt_jax.data.task import Instance, Task, check_labels, check_text, read_instances, read_json


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns a sentence naming the known name closest to `name`, for error messages."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f"The nearest known name is {close[0]!r}."
    return f"Known names: {', '.join(known) if known else 'none'}."


def folders_in(root: Path) -> list[str]:
    """The names of the folders in a folder, without those that operating systems and programs hide."""
    return [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]


def find_folder(root: Path, candidates: Sequence[str], purpose: str) -> Path:
    """Returns the first of `root/candidate` that is a folder; raises FileNotFoundError naming all of them."""
    tried = [root / candidate for candidate in candidates]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no {purpose} under {root}: looked for {', '.join(map(str, tried))}. "
        f"Set config.data_dir or the environment variable SAPT_DATA_DIR to the folder that holds it."
    )


def definition_of(data: dict, file: Path) -> str:
    """Returns the task definition of a parsed file ("" when it has none); of several the first counts."""
    definition = data.get("Definition", "")
    if isinstance(definition, list):
        definition = definition[0] if definition else ""
    return check_text(definition, f'{file}: "Definition"')


def instances_of(data: Any, file: Path, **options) -> tuple[Instance, ...]:
    """Reads the "Instances" of a parsed file; `options` go to `task.read_instances`."""
    if not isinstance(data, dict) or not isinstance(data.get("Instances"), list):
        raise ValueError(f'{file}: expected an object with a list "Instances" (natural-instructions format).')
    entries = ((f"{file}: instance {i}", entry) for i, entry in enumerate(data["Instances"]))
    return read_instances(entries, **options)


@dataclasses.dataclass(frozen=True)
class BenchmarkFolder:
    """A folder in the CL_Benchmark layout.

    Attributes:
      name: its name, as "SuperNI".
      known: names of the benchmark's tasks, for the error about an unknown name.
      parent: the folder that it is published in.
      splits: files of every task. A dev.json is never read: in the published data it equals test.json.
    """

    name: str
    known: Sequence[str] = ()
    parent: str = "CL_Benchmark"
    splits: Sequence[str] = ("train", "test")


def read_cl_benchmark(name: str, benchmark: BenchmarkFolder, *, root: Path, on_bad_instance: str) -> Task:
    """Reads one task of a folder in the CL_Benchmark layout; dev is left empty.

    `root` is the folder that holds `{parent}/{folder}`, or `{folder}`, or the task folders.
    """
    here = [""] if root.name == benchmark.name else []
    candidates = [f"{benchmark.parent}/{benchmark.name}", benchmark.name, *here]
    folder = find_folder(root, candidates, f"{benchmark.name} data")
    if not (folder / name).is_dir():
        present = folders_in(folder)
        if name in benchmark.known:
            raise FileNotFoundError(f"{folder / name}: the folder of this task is missing. Tasks there: {present}.")
        raise ValueError(f"unknown task {name!r} in {folder}. {nearest_name(name, [*benchmark.known, *present])}")
    problems: list[str] = []
    instances: dict[str, tuple[Instance, ...]] = {}
    definition = ""
    for split in benchmark.splits:
        file = folder / name / f"{split}.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: task {name!r} needs {' and '.join(benchmark.splits)}.")
        data = read_json(file)
        instances[split] = instances_of(
            data, file, prefix=f"{name}-{split}", on_bad_instance=on_bad_instance, problems=problems
        )
        definition = definition or definition_of(data, file)
    labels_file = folder / name / "labels.json"
    labels = check_labels(read_json(labels_file), str(labels_file)) if labels_file.is_file() else ()
    return Task(
        name,
        definition,
        instances.get("train", ()),
        (),
        instances["test"],
        labels=labels,
        problems=tuple(problems),
    )


def task_rng(seed: int, name: str, purpose: str) -> np.random.Generator:
    """A generator that depends on these arguments alone, so the order of calls does not matter."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(purpose.encode())])


def read_natural_instructions(name: str, *, root: Path, known: Sequence[str], on_bad_instance: str, seed: int) -> Task:
    """Reads one task of a natural-instructions clone and cuts it, seeded, as the paper's sizes show.

    Of n instances, ceil(n/10) but at most 100 are test, as many are dev, and at most 1,000 of the rest are
    train (this rule gives the published sizes of all 15 SuperNI tasks). `root` is the clone, its `tasks`
    folder, or any folder with `{name}.json`.
    """
    folder = find_folder(root, ["tasks", ""], "natural-instructions task files")
    file = folder / f"{name}.json"
    if not file.is_file():
        present = [path.stem for path in folder.glob("[!.]*.json")]
        if name in known:
            raise FileNotFoundError(f"{file}: the file of this task is missing; {len(present)} tasks are there.")
        raise ValueError(f"unknown task {name!r} in {folder}. {nearest_name(name, [*known, *present])}")
    data = read_json(file)
    problems: list[str] = []
    instances = instances_of(data, file, prefix=name, on_bad_instance=on_bad_instance, problems=problems)
    order = task_rng(seed, name, "natural_instructions").permutation(len(instances))
    held_out = min(100, math.ceil(len(instances) / 10))
    cuts = np.split(order, [held_out, 2 * held_out])
    test, dev, train = (tuple(instances[i] for i in np.sort(cut)) for cut in (cuts[0], cuts[1], cuts[2][:1000]))
    return Task(name, definition_of(data, file), train, dev, test, problems=tuple(problems))
