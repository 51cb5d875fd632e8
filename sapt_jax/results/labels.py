"""What is told with every score: whether the method was told the task, the old data that it saw, and what it keeps."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sapt_jax.data.encoding import EncodedSplit
from sapt_jax.state import Tree, is_leaf

TOKEN_BYTES = 4


def count_kept(leaves: Tree, pools: Iterable[EncodedSplit]) -> dict[str, int]:
    """What is kept from task to task beside the base model: {"parameters", "bytes"}.

    Args:
      leaves: declarations of the arrays, whose entries are the parameters (`Method.kept_leaves`).
      pools: samples of earlier tasks, whose token ids take bytes too.
    """
    declared = jax.tree.leaves(leaves, is_leaf=is_leaf)
    sizes = [math.prod(leaf.shape) for leaf in declared]
    arrays = sum(size * np.dtype(leaf.dtype).itemsize for size, leaf in zip(sizes, declared, strict=True))
    tokens = sum(len(rows.ids) for pool in pools for rows in (pool.sources, pool.targets))
    return {"parameters": sum(sizes), "bytes": arrays + TOKEN_BYTES * tokens}


def short(labels: Mapping[str, Any]) -> dict[str, str]:
    """The main ones of scores.json's `labels` in a few letters each, by what they are; "–" in an older run's."""
    if not labels:
        return dict.fromkeys(("told the task", "old data", "kept"), "–")
    told = "oracle" if labels["routing"] == "oracle" else "yes" if labels["needs_task_id"] else "no"
    rows = f", {labels['rows']} rows" if labels["rows"] else ""
    return {"told the task": told, "old data": f"{labels['old_data']}{rows}", "kept": format_bytes(labels["bytes"])}


def one_line(labels: Mapping[str, Any]) -> str:
    """The same in a line, as it stands under scores."""
    return "; ".join(f"{name}: {value}" for name, value in short(labels).items())


def format_bytes(number: int) -> str:
    """999 -> "999 B", 1_234_567 -> "1.2 MB"."""
    if number < 1000:
        return f"{number} B"
    power = min(int(math.log10(number)) // 3, 4)
    return f"{number / 1000**power:.3g} {' kMGT'[power]}B"
