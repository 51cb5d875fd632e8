"""Which runs a page is of, and which of them differ in their seed alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from sapt_jax.config import SETTINGS, idle_sections
from sapt_jax.report.told import model_name, settings_of
from sapt_jax.results.figures.comparison import Group
from sapt_jax.results.figures.style import shorten
from sapt_jax.results.record import Record, is_workdir, read_record
from sapt_jax.storage.paths import as_path

# Folders below the one that is named, at most: a study's runs lie in one of its own.
_DEPTH = 4
_SEEDS = ("seed", "data.seed")


def read_runs(folders: Sequence[str]) -> list[Record]:
    """The runs in folders: each is a workdir, or holds workdirs, as a study's does.

    Raises:
      FileNotFoundError: a folder is not there or holds no run.
    """
    found: dict[str, epath.Path] = {}
    for folder in folders:
        path = as_path(folder)
        workdirs = list(_workdirs(path, _DEPTH))
        if not workdirs:
            raise FileNotFoundError(f"{folder}: no run lies here; give the --workdir of a run, or a folder of such.")
        for workdir in workdirs:
            found.setdefault(str(workdir.resolve()), workdir)
    names = _names([*found])
    return [read_record(workdir, name) for workdir, name in zip(found.values(), names, strict=True)]


def _workdirs(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    if not folder.is_dir():
        return
    if is_workdir(folder):
        yield folder
    elif depth:
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith("."):
                yield from _workdirs(inner, depth - 1)


def _names(paths: Sequence[str]) -> list[str]:
    """What is left of paths without the folders that they share."""
    parts = [path.split("/") for path in paths]
    shared = 0
    while len(paths) > 1 and len({tuple(part[: shared + 1]) for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) if len(paths) > 1 else part[-1] for part in parts]


def group_runs(records: Sequence[Record]) -> list[Group]:
    """Runs that differ in their seed alone, together; each group is called by what tells it from the others."""
    settings = [settings_of(record) for record in records]
    differing = _differing(settings)
    grouped: dict[tuple[Any, ...], list[int]] = {}
    for place, (record, each) in enumerate(zip(records, settings, strict=True)):
        key = (record.method, model_name(each), record.tasks, *(repr(each.get(name)) for name in differing))
        grouped.setdefault(key, []).append(place)
    several_models = len({key[1] for key in grouped}) > 1
    labels = []
    for key, at in grouped.items():
        # What another method needs is no part of this one's name.
        alike = _differing([each for each in settings if each.get("method") == settings[at[0]].get("method")])
        labels.append((_label(records[at[0]], settings[at[0]], alike), key[1]))
    groups = []
    for places, (label, model) in zip(grouped.values(), labels, strict=True):
        if labels.count((label, model)) > 1:
            # Orders of tasks; one of a user's own has no name.
            order = str(settings[places[0]].get("task_order", ","))
            label += f" ({records[places[0]].name if ',' in order else order})"
        runs = tuple(records[place] for place in places)
        groups.append(Group(f"{label}, {model}" if several_models else label, label, model, runs))
    return groups


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in _telling(settings) if len({repr(each.get(name)) for each in settings}) > 1]


def _telling(settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Settings that may tell two runs apart: not where things lie, nor what an idle method would do."""
    idle = idle_sections(*(each.get("method") for each in settings))
    apart = ("method", "model.path", "model.variant", "model.tokenizer", "task_order", *_SEEDS)
    for name, row in SETTINGS.items():
        if name not in apart and not name.startswith(idle) and not row.free:
            yield name


def _label(record: Record, settings: Mapping[str, Any], differing: Sequence[str]) -> str:
    """The method, and what of its settings is not the default where runs differ."""
    others = idle_sections(record.method)
    told = [
        f"{name.rsplit('.', 1)[-1]}={shorten(str(settings[name]), 24)}"
        for name in differing
        if name in settings and not name.startswith(others) and settings[name] != SETTINGS[name].default
    ]
    return ", ".join([record.method, *told])
