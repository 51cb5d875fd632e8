"""The scores of other runs that a run's are compared with: tasks learned alone for FWT, or all at once for IM."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sapt_jax.results.scores import read_scores
from sapt_jax.storage.text_files import to_jsonable

SINGLE_TASK, JOINT = "single_task", "joint"


@dataclasses.dataclass(frozen=True)
class References:
    """Scores by task; empty where there are none.

    Attributes:
      single: of models that learned a task alone.
      joint: of one model that learned all tasks at once.
    """

    single: Mapping[str, float] = dataclasses.field(default_factory=dict)
    joint: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Terms:
    """What makes scores of another run comparable.

    Attributes:
      protocol: settings that have to be the same, by dotted name.
      understand: a run's config, as it was written with its scores, -> its settings by dotted name, those that an older
        run lacks included.
    """

    protocol: Mapping[str, Any]
    understand: Callable[[Mapping[str, Any]], Mapping[str, Any]]


def read_single_task_scores(workdirs: Sequence[str], terms: Terms) -> dict[str, float]:
    """Task -> score, of runs of one task each or of a run of `single_task`, as far as that has come.

    Raises FileNotFoundError or ValueError: a folder without scores, a run of several tasks, or another protocol.
    """
    scores: dict[str, float] = {}
    for workdir in workdirs:
        run = _read(workdir, terms)
        if len(run["task_order"]) > 1 and run["method"] != SINGLE_TASK:
            raise ValueError(
                f"{workdir}: a run of {len(run['task_order'])} tasks by {run['method']}; FWT needs one of "
                f"config.method={SINGLE_TASK!r}, or runs of one task each"
            )
        scores |= _by_task(run, np.diag(run["matrix"]))
    return scores


def read_joint_scores(workdir: str, terms: Terms) -> dict[str, float]:
    """Task -> score, of a run of `joint`, which ends with one model for all tasks.

    Raises FileNotFoundError or ValueError: a folder without scores, a run of another method, or another protocol.
    """
    run = _read(workdir, terms)
    if run["method"] != JOINT:
        raise ValueError(f"{workdir}: a run of {run['method']}; intransigence needs one of config.method={JOINT!r}")
    return _by_task(run, run["matrix"][-1])


def _by_task(run: Mapping[str, Any], scores: np.ndarray) -> dict[str, float]:
    """Scores [T] by the run's tasks, as far as there are any."""
    found = zip(run["task_order"], scores, strict=True)
    return {name: float(score) for name, score in found if not np.isnan(score)}


def _read(workdir: str, terms: Terms) -> dict[str, Any]:
    run = read_scores(workdir)
    wanted, found = to_jsonable(terms.protocol), to_jsonable(terms.understand(run["config"]))
    differ = sorted(name for name in wanted if found.get(name) != wanted[name])
    if differ:
        raise ValueError(f"{workdir}: scored with other settings of {', '.join(differ)}; run it with this run's")
    return run
