"""The scores of other runs that a run's are compared with: tasks learned alone, for FWT."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sapt_jax.results.scores import read_scores
from sapt_jax.storage.text_files import to_jsonable

SINGLE_TASK = "single_task"


@dataclasses.dataclass(frozen=True)
class References:
    """Scores by task; empty where there are none.

    Attributes:
      single: of models that learned a task alone.
    """

    single: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
        alone = zip(run["task_order"], np.diag(run["matrix"]), strict=True)
        scores |= {name: float(score) for name, score in alone if not np.isnan(score)}
    return scores


def _read(workdir: str, terms: Terms) -> dict[str, Any]:
    run = read_scores(workdir)
    wanted, found = to_jsonable(terms.protocol), to_jsonable(terms.understand(run["config"]))
    differ = sorted(name for name in wanted if found.get(name) != wanted[name])
    if differ:
        raise ValueError(f"{workdir}: scored with other settings of {', '.join(differ)}; run it with this run's")
    return run
