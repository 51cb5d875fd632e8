"""Methods as studies name them: each a delta on the config that all runs of a study share."""

from typing import Any

from ml_collections import ConfigDict

from configs.methods import preset
from sapt_jax.data.benchmarks import TASK_ORDERS
from sapt_jax.study.grid import make_study

SOURCES = ("statistics", "generate", "files", "train", "none")
# By what stands for the inputs of earlier tasks in the reflection loss.
SAPT = {f"sapt-{source}": {"method": "sapt", "pseudo_samples.source": source} for source in SOURCES}
# Ways to open a task's slot that leave the others a share, in place of the warm start.
TRANSFER = {
    "sapt-key": {"sapt.key_start": "query", "sapt.warm_start_steps": 0},
    "sapt-floor": {"sapt.young_steps": 16, "sapt.warm_start_steps": 0},
    "sapt-key-floor": {"sapt.key_start": "query", "sapt.young_steps": 16, "sapt.warm_start_steps": 0},
}
SAPT |= {name: SAPT["sapt-statistics"] | changes for name, changes in TRANSFER.items()}
# What the paper compares SAPT with, and the bound.
PAPER = ("sapt-files", "sapt-statistics", "sapt-generate", "sequential", "single_task", "inc_lora", "o_lora", "epi")
PAPER += ("replay", "l2p", "lfpt5", "prog_prompt")


def some(c: ConfigDict, *names: str) -> dict[str, dict[str, Any]]:
    """The deltas on `c` of methods of configs/methods.py, and of SAPT by source, in this order."""
    return {name: SAPT[name] if name in SAPT else preset(c, name) for name in names}


def paper_grid(c: ConfigDict) -> ConfigDict:
    """The paper's study with a model on a benchmark: all that it compares, both orders, three seeds."""
    orders = {name: name for name, tasks in TASK_ORDERS.items() if set(tasks) == set(TASK_ORDERS[c.task_order])}
    return make_study(c, some(c, *PAPER), orders, seeds=(42, 43, 44))
