"""One pass over a split: what a jitted function says of every row, or the sums of what it says of every batch."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sapt_jax.data.batching import FILLER, Layout, Share, eval_batches
from sapt_jax.data.encoding import EncodedSplit
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.sharding import own_slice, place_batch


def map_sources(
    function: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]], split: EncodedSplit, layout: Layout, mesh: Mesh
) -> list[np.ndarray]:
    """Applies `function(source [B, S], source_mask [B, S])` to every input of a split.

    All batches are dispatched before the first result is fetched, so that the device never waits for the host.

    Returns:
      One array for each output of `function`, its rows in the split's order.
    """
    rows, outputs = [], []
    for own, batch in eval_batches(split, layout, Share(*own_slice(mesh))):
        # Row numbers travel with the rows: a mesh may order its devices otherwise than the processes.
        named = {"source": batch["source"], "source_mask": batch["source_mask"], "rows": own.astype(np.int32)}
        placed = place_batch(named, mesh)
        outputs.append(function(placed["source"], placed["source_mask"]))
        rows.append(placed["rows"])
    order = np.concatenate([gather(own) for own in rows])
    real = order != FILLER
    place = np.argsort(order[real])
    return [np.concatenate([gather(part) for part in parts])[real][place] for parts in zip(*outputs, strict=True)]


def sum_batches(
    function: Callable[[dict[str, jax.Array]], Any], split: EncodedSplit, layout: Layout, mesh: Mesh
) -> Any:
    """The sum over a split's batches of the tree that `function(batch)` gives, in float64 on the host.

    A batch has `source` [B, S], `target` [B, L] and their masks, which are False on the rows that fill it up. What
    `function` gives is whole on every device. A batch's sums are fetched when the next one is dispatched: no more than
    two batches' are held at a time.
    """
    batches = eval_batches(split, layout, Share(*own_slice(mesh)))
    parts = (function(place_batch(batch, mesh)) for _, batch in batches)
    total = None
    for part, _ in itertools.pairwise(itertools.chain(parts, (None,))):
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of an array whose parts lie on several processes, or every process's own numpy rows, in their order."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def decode_texts(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts of decoded ids [n, N], each up to its end token, stripped."""

    def text(row: np.ndarray) -> str:
        ends = np.flatnonzero(row == tokenizer.eos_id)
        return tokenizer.decode(row[: ends[0]] if ends.size else row).strip()

    return tuple(text(row) for row in tokens)
