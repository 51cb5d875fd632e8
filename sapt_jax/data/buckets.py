"""Bucket shapes (source length, target length): chosen from the data, and assigned to rows.

A row costs Ls + Lt positions in either model family, and those of a soft prompt before it; padding is measured in
them.
"""

from collections.abc import Sequence

import numpy as np

from sapt_jax.settings import shown

Bucket = tuple[int, int]


def _round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    return -(-lengths // multiple) * multiple


def choose_buckets(
    lengths: np.ndarray, *, max_buckets: int, source_multiple: int, target_multiple: int, prompt_length: int
) -> list[Bucket]:
    """Chooses at most `max_buckets` shapes for the given rows, with little padding.

    A k-median search: start from the shape that bounds all rows, add the shape that saves most until
    `max_buckets` are there, then exchange one for another as long as that saves something. The bounding shape
    stays, so every row and every mixture of rows has a bucket.

    Args:
      lengths: [n, 2] source and target length of every row of every task and split.
      source_multiple, target_multiple: lengths are rounded up to a multiple of these, the source's together with
        the prompt's.
      prompt_length: positions that a soft prompt takes before every source; buckets do not count them.
    Returns: buckets in ascending order of Ls + Lt.
    """
    if len(lengths) == 0 or max_buckets < 1:
        raise ValueError(f"cannot choose {max_buckets} bucket(s) for {len(lengths)} rows: both must be at least 1.")
    prompt = np.array([prompt_length, 0])
    rounded = _round_up(np.maximum(lengths, 1) + prompt, np.array([source_multiple, target_multiple])) - prompt
    shapes, counts = np.unique(rounded, axis=0, return_counts=True)
    grid = np.stack(np.meshgrid(*(np.unique(side) for side in shapes.T), indexing="ij"), -1).reshape(-1, 2)
    # cost[s, g]: the positions that all rows of shape s take up in bucket g. The last of the grid bounds all
    # shapes.
    holds = (shapes[:, None, :] <= grid[None, :, :]).all(-1)
    cost = np.where(holds, (grid.sum(-1) + prompt_length)[None, :] * counts[:, None], np.inf)

    def best_addition(chosen: list[int]) -> tuple[float, int]:
        totals = np.minimum(cost, cost[:, chosen].min(axis=1, keepdims=True)).sum(0)
        return float(totals.min()), int(totals.argmin())

    chosen = [len(grid) - 1]
    total = float(cost[:, chosen].min(axis=1).sum())
    while len(chosen) < max_buckets:
        new_total, addition = best_addition(chosen)
        if new_total >= total:
            break
        total, chosen = new_total, [*chosen, addition]
    improved = len(chosen) > 1
    while improved:
        improved = False
        for old in chosen[1:]:
            others = [g for g in chosen if g != old]
            new_total, addition = best_addition(others)
            if new_total < total:
                total, chosen, improved = new_total, [*others, addition], True
    return check_buckets(grid[chosen].tolist())


def check_buckets(buckets: Sequence[Sequence[int]]) -> list[Bucket]:
    """Sorts buckets (given in the config, or chosen) by Ls + Lt; the last has to bound all the others."""
    given = f"config.data.buckets={shown(buckets)}"
    pairs = all(isinstance(bucket, list | tuple) and len(bucket) == 2 for bucket in buckets)
    lengths = [length for bucket in buckets for length in bucket] if pairs else []
    if not lengths or not all(isinstance(n, int | np.integer) and 0 < n < 2**31 for n in lengths):
        raise ValueError(f"{given} must be pairs of positive lengths (source, target), such as ((256, 32), (512, 64)).")
    ordered: list[Bucket] = sorted({(int(ls), int(lt)) for ls, lt in buckets}, key=lambda pair: (sum(pair), pair))
    top = (max(ls for ls, _ in ordered), max(lt for _, lt in ordered))
    if ordered[-1] != top:
        raise ValueError(f"{given}: one must bound all the others; add {top}.")
    return ordered


def assign_buckets(lengths: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """[n] int64: for every row of `lengths` [n, 2] the cheapest bucket that holds it. Raises if none does."""
    shapes = np.array(buckets)
    fits = (lengths[:, None, :] <= shapes[None, :, :]).all(-1)
    if not fits.any(-1).all():
        row = int(np.argmin(fits.any(-1)))
        raise ValueError(
            f"a row of {lengths[row, 0]} source and {lengths[row, 1]} target tokens fits none of the buckets "
            f"{list(buckets)}. Add a larger one to config.data.buckets, or lower config.data.max_source_length and "
            "config.data.max_target_length."
        )
    return np.where(fits, shapes.sum(-1), np.iinfo(np.int64).max).argmin(-1)


def source_buckets(buckets: Sequence[Bucket], target_length: int) -> list[Bucket]:
    """The buckets' distinct source lengths, all with one target length: for decoding, where no target is fed."""
    return [(ls, target_length) for ls in sorted({ls for ls, _ in buckets})]
