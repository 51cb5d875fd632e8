"""Batches as pure functions of (seed, task, epoch, step), for training and for evaluation.

A batch is a dict of numpy arrays: source [B, Ls] int32, source_mask [B, Ls] bool, target [B, Lt] int32,
target_mask [B, Lt] bool. The source is the whole prompt: padded on the left for decoder-only models, on the
right for encoder-decoder models. The target is the answer and the end token, padded on the right. A filler
row of a batch that is not full has both masks False everywhere.
"""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from sapt_jax.data.buckets import Bucket, assign_buckets, source_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged

Batch = dict[str, np.ndarray]
Plan = list[tuple[Bucket, np.ndarray]]
FILLER = -1


def pad_rows(
    ragged: Ragged, rows: np.ndarray, *, length: int, padding_side: str, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids [B, length] int32, mask [B, length] bool) of the rows; a row of -1 is filler.

    padding_side: "left" or "right". Raises ValueError if a row is longer than `length`.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", not {padding_side!r}.')
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if row != FILLER:
            tokens = ragged[int(row)]
            if len(tokens) > length:
                raise ValueError(f"row {row} has {len(tokens)} tokens, more than the batch's {length}.")
            place = slice(length - len(tokens), length) if padding_side == "left" else slice(0, len(tokens))
            ids[i, place] = tokens
            mask[i, place] = True
    return ids, mask


def make_batch(split: EncodedSplit, rows: np.ndarray, bucket: Bucket, *, padding_side: str, pad_id: int) -> Batch:
    """Returns the batch of the given rows ([B], -1 for filler) in the shape of `bucket`."""
    source, source_mask = pad_rows(split.sources, rows, length=bucket[0], padding_side=padding_side, pad_id=pad_id)
    target, target_mask = pad_rows(split.targets, rows, length=bucket[1], padding_side="right", pad_id=pad_id)
    return {"source": source, "source_mask": source_mask, "target": target, "target_mask": target_mask}


def _seed32(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    # A Grain shuffle is a random-access permutation: the same rows for the same seed on every machine.
    dataset = grain.MapDataset.source(rows).shuffle(seed=seed)
    return np.array([dataset[i] for i in range(len(rows))], dtype=np.int64)


def _cut_into_batches(rows: np.ndarray, lengths: np.ndarray, buckets: Sequence[Bucket], batch_size: int) -> Plan:
    """Cuts rows into batches from the largest bucket down, each in the cheapest bucket that holds its rows.

    Within a bucket the order of `rows` stays. What a bucket leaves over shares a batch with the first rows of
    the next smaller one: there are always ceil(n / batch_size) batches, and filler falls into the cheapest.
    """
    assigned = assign_buckets(lengths, buckets)
    rows = rows[np.argsort(-assigned[rows], kind="stable")]
    plan = []
    for start in range(0, len(rows), batch_size):
        own = rows[start : start + batch_size]
        bucket = buckets[assign_buckets(lengths[own].max(axis=0, keepdims=True), buckets)[0]]
        plan.append((bucket, np.pad(own, (0, batch_size - len(own)), constant_values=FILLER)))
    return plan


def epoch_plan(
    lengths: np.ndarray, buckets: Sequence[Bucket], *, batch_size: int, seed: int, task_index: int, epoch: int
) -> Plan:
    """The batches of one epoch, in order: [(bucket, rows [batch_size] int64, -1 for filler)].

    Pure: depends on the arguments alone. Every row occurs exactly once, and every epoch has
    ceil(n / batch_size) batches.

    Args:
      lengths: [n, 2] source and target lengths of the task's rows.
      buckets: from `choose_buckets` or `check_buckets` (ascending; the last bounds all).
    """
    shuffled = _shuffled(np.arange(len(lengths)), _seed32(seed, task_index, epoch, 0))
    plan = _cut_into_batches(shuffled, lengths, buckets, batch_size)
    order = _shuffled(np.arange(len(plan)), _seed32(seed, task_index, epoch, 1))
    return [plan[i] for i in order]


def eval_plan(lengths: np.ndarray, buckets: Sequence[Bucket], *, batch_size: int) -> Plan:
    """The batches of one pass over a split in a fixed order, the largest first; otherwise as `epoch_plan`."""
    return _cut_into_batches(np.arange(len(lengths)), lengths, buckets, batch_size)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """ceil(num_rows / batch_size): the number of batches of every epoch."""
    return -(-num_rows // batch_size)


def count_positions(plan: Plan, prompt_length: int) -> int:
    """The positions (P + Ls + Lt of every row, filler included) of a plan's batches: tokens and padding."""
    return sum((prompt_length + sum(bucket)) * len(rows) for bucket, rows in plan)


def _own_rows(rows: np.ndarray, index: int, count: int) -> np.ndarray:
    """This process's slice, contiguous, as `jax.make_array_from_process_local_data` wants it."""
    if len(rows) % count:
        raise ValueError(f"batch_size {len(rows)} is not a multiple of the {count} processes: change batch_size.")
    share = len(rows) // count
    return rows[index * share : (index + 1) * share]


class _TrainSource:
    """Random access from the global step to this process's slice of that step's batch."""

    def __init__(self, split, buckets, *, batch_size, seed, task_index, num_steps, padding_side, pad_id, process):
        self._num_steps = num_steps
        self._per_epoch = steps_per_epoch(len(split), batch_size)
        self._make = functools.partial(make_batch, split, padding_side=padding_side, pad_id=pad_id)
        self._process = process
        # Two epochs: prefetch threads read ahead across the border.
        self._plan = functools.lru_cache(maxsize=2)(
            functools.partial(
                epoch_plan, split.lengths, buckets, batch_size=batch_size, seed=seed, task_index=task_index
            )
        )

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(int(step), self._per_epoch)
        bucket, rows = self._plan(epoch=epoch)[place]
        return self._make(_own_rows(rows, *self._process), bucket)


def train_batches(
    split: EncodedSplit,
    buckets: Sequence[Bucket],
    *,
    batch_size: int,
    seed: int,
    task_index: int,
    start_step: int,
    num_steps: int,
    padding_side: str,
    pad_id: int,
    process_index: int,
    process_count: int,
    prefetch_threads: int,
    prefetch_batches: int,
) -> Iterator[Batch]:
    """Yields the batches of steps `start_step` to `num_steps - 1`, read ahead by Grain's threads.

    Batch k is the same whatever `start_step` was; it lies in epoch k // steps_per_epoch(n, batch_size).

    Args:
      batch_size: rows of the global batch, over all processes; a multiple of `process_count`.
      process_index, process_count: which contiguous slice of every global batch to yield; all processes see
        the same bucket at the same step, and disjoint rows.
      padding_side: of the sources; "left" for decoder-only models, whose target then follows the prompt at once,
        "right" for encoder-decoder models.
      prefetch_threads, prefetch_batches: Grain's reader threads and how many batches they keep ready (0
        threads: each batch is made when asked for).
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count} processes.")
    _own_rows(np.arange(batch_size), process_index, process_count)
    source = _TrainSource(
        split,
        list(buckets),
        batch_size=batch_size,
        seed=seed,
        task_index=task_index,
        num_steps=num_steps,
        padding_side=padding_side,
        pad_id=pad_id,
        process=(process_index, process_count),
    )
    options = grain.ReadOptions(num_threads=prefetch_threads, prefetch_buffer_size=prefetch_batches)
    dataset = grain.MapDataset.source(source).slice(slice(start_step, None))
    return iter(dataset.to_iter_dataset(options))


def eval_batches(
    split: EncodedSplit,
    buckets: Sequence[Bucket],
    *,
    batch_size: int,
    target_length: int,
    padding_side: str,
    pad_id: int,
    process_index: int,
    process_count: int,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows [b] int64 with -1 for filler, batch) over a split once, every row exactly once over all
    processes.

    Only the source lengths of the buckets matter; every target is `target_length` wide, so decoding compiles
    once for each source length. Arguments as in `train_batches`.
    """
    shapes = source_buckets(buckets, target_length)
    for bucket, rows in eval_plan(split.lengths, shapes, batch_size=batch_size):
        own = _own_rows(rows, process_index, process_count)
        yield own, make_batch(split, own, bucket, padding_side=padding_side, pad_id=pad_id)
