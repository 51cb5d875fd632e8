"""What runs a study has, and which of them one process takes."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sapt_jax.config import check_config

Delta = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a study: what its method is called there, the name of its order, its seed, and its config."""

    method: str
    order: str
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """Also the run's folder in that of the study."""
        return f"{self.method}/{self.order}/seed{self.seed}"


def make_study(
    config: ConfigDict, methods: Mapping[str, Delta], orders: Mapping[str, str], seeds: Sequence[int]
) -> ConfigDict:
    """A study, as a file of configs/studies/ returns it.

    Args:
      config: what all runs share.
      methods: what a method is called -> its delta on `config`, values by dotted name.
      orders: name -> config.task_order.
    """
    pairs = tuple((label, tuple(delta.items())) for label, delta in methods.items())
    return ConfigDict({"config": config, "methods": pairs, "orders": tuple(orders.items()), "seeds": tuple(seeds)})


def plan(study: ConfigDict) -> list[Planned]:
    """The runs of a study: all methods and orders with the first seed, then with the next.

    Raises:
      ValueError: a name that cannot be a folder, or a run whose config is wrong.
    """
    missing = {"config", "methods", "orders", "seeds"} - set(study)
    if missing:
        raise ValueError(f"a study is made by sapt_jax.study.grid.make_study; this has no {', '.join(sorted(missing))}")
    return [
        _planned(study.config, method, order, seed)
        for seed in study.seeds
        for order in study.orders
        for method in study.methods
    ]


def _planned(config: ConfigDict, method: tuple, order: tuple, seed: int) -> Planned:
    (label, delta), (name, tasks) = method, order
    for part in (label, name):
        if not part or set(part) & set("/\\*?[]") or part.startswith("."):
            raise ValueError(f"a study's method or order cannot be called {part!r}: it becomes a folder")
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict({**dict(delta), "task_order": tasks, "seed": seed})
    planned = Planned(label, name, seed, own)
    try:
        check_config(own)
    except ValueError as error:
        raise ValueError(f"{planned.name}: {error}") from None
    return planned


def choose(runs: Sequence[Planned], only: str, shard: str) -> list[Planned]:
    """The runs that this process takes.

    Args:
      only: patterns over the runs' names, with commas, as of a shell; "" is all.
      shard: "i/n" is the part i of n, counted from 0; "" is all.

    Raises:
      ValueError: a pattern that fits no run, or no such part.
    """
    patterns = [pattern.strip() for pattern in only.split(",") if pattern.strip()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(run.name, pattern) for run in runs):
            raise ValueError(f"--only={pattern} fits none of the runs: {', '.join(run.name for run in runs)}")
    if patterns:
        runs = [run for run in runs if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)]
    if not shard:
        return list(runs)
    number, slash, of = shard.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise ValueError(f"--shard={shard} is not i/n with i from 0 to n - 1, such as 0/4")
    return list(runs[int(number) :: int(of)])
