"""Batches as pure functions of (seed, task, epoch, step), for training and for evaluation.

A batch is a dict of numpy arrays: source [B, Ls] int32, source_mask [B, Ls] bool, target [B, Lt] int32,
target_mask [B, Lt] bool. The source is the whole prompt: padded on the left for decoder-only models, on the
right for encoder-decoder models. The target is the answer and the end token, padded on the right. A filler
row of a batch that is not full has both masks False everywhere.

For methods with replay a training batch also says of each row the place of its task, task [B] int32, and how much its
answer's tokens count, weight [B] float32; over a batch they sum to the number of these tokens. Where a method learns to
write rows, `writing` is a batch of the same rows as cue and text, whose weights sum to the same number.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sapt_jax.data.buckets import Bucket, assign_buckets, source_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.data.lesson import Lesson, epoch_rows, mix_in, row_weights

Batch = dict[str, Any]
Plan = list[tuple[Bucket, np.ndarray]]
FILLER = -1


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of a split become batches.

    Attributes:
      buckets: from `choose_buckets` or `check_buckets` (ascending; the last bounds all).
      batch_size: rows of the global batch, over all processes.
      padding_side: of the sources; "left" for decoder-only models, whose target then follows the prompt at once,
        "right" for encoder-decoder models.
      pad_id: what fills the rest of a row.
      epoch_batches: batches of a training epoch where it leaves rows out, in every epoch others; None takes all rows.
      texts: tokens of a cue, and how many more than its prompt and answer a row's text may have; None where no text is
        written.
    """

    buckets: Sequence[Bucket]
    batch_size: int
    padding_side: str
    pad_id: int
    epoch_batches: int | None = None
    texts: tuple[int, int] | None = None

    def __post_init__(self):
        if self.padding_side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", not {self.padding_side!r}.')


@dataclasses.dataclass(frozen=True)
class Share:
    """Which contiguous slice of every global batch a process makes, as `jax.make_array_from_process_local_data` wants.

    All processes see the same bucket at the same step, and disjoint rows.
    """

    process_index: int
    process_count: int

    def __post_init__(self):
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index {self.process_index} is not one of {self.process_count} processes.")

    def of(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of a batch; raises ValueError where they do not split evenly."""
        if len(rows) % self.process_count:
            raise ValueError(
                f"batch_size {len(rows)} is not a multiple of the {self.process_count} processes: change batch_size."
            )
        size = len(rows) // self.process_count
        return rows[self.process_index * size : (self.process_index + 1) * size]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps `start` to `stop` - 1 of a lesson, whose rows are shuffled by `seed` and its place."""

    seed: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Prefetch:
    """Grain's reader threads and how many batches they keep ready (0 threads: each batch is made when asked for)."""

    threads: int
    batches: int


def pad_rows(
    ragged: Ragged, rows: np.ndarray, *, length: int, padding_side: str, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids [B, length] int32, mask [B, length] bool) of the rows; a row of -1 is filler.

    Raises ValueError if a row is longer than `length`.
    """
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


def make_batch(split: EncodedSplit, rows: np.ndarray, bucket: Bucket, layout: Layout) -> Batch:
    """Returns the batch of the given rows ([B], -1 for filler) in the shape of `bucket`."""
    side, pad_id = layout.padding_side, layout.pad_id
    source, source_mask = pad_rows(split.sources, rows, length=bucket[0], padding_side=side, pad_id=pad_id)
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


def epoch_plan(lesson: Lesson, layout: Layout, *, seed: int, epoch: int) -> Plan:
    """The batches of one epoch, in order: [(bucket, rows [batch_size] int64, -1 for filler)].

    Pure: depends on the arguments alone. Every own row occurs exactly once, unless tasks are to be equal, and every
    epoch has ceil(n / own rows of a batch) batches. With fewer `epoch_batches` it has so many, and leaves out rows that
    the epoch draws.
    """
    replayed, key = lesson.replayed(layout.batch_size), (seed, lesson.index, epoch)
    own = layout.batch_size - replayed
    rows = _shuffled(np.arange(lesson.own), _seed32(*key, 0))
    if lesson.equal:
        rows = _shuffled(epoch_rows(rows, lesson.tasks), _seed32(*key, 3))
    if layout.epoch_batches is not None:
        rows = rows[: layout.epoch_batches * own]
    plan = _cut_into_batches(rows, lesson.lengths, layout.buckets, own)
    order = _shuffled(np.arange(len(plan)), _seed32(*key, 1))
    plan = [plan[i] for i in order]
    return mix_in(plan, lesson, layout.buckets, (*key, 2), replayed) if replayed else plan


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """ceil(num_rows / batch_size): the number of batches of every epoch."""
    return -(-num_rows // batch_size)


def whole_steps_per_epoch(num_rows: int, batch_size: int, accumulation: int) -> int:
    """Updates of an epoch as transformers counts them: its micro-batches, the last of which may be part, give so many.

    At least one; 1,000 rows in 4 micro-batches of 8 give 31.
    """
    return max(1, steps_per_epoch(num_rows, batch_size // accumulation) // accumulation)


def count_positions(plan: Plan, prompt_length: int) -> int:
    """The positions (P + Ls + Lt of every row, filler included) of a plan's batches: tokens and padding."""
    return sum((prompt_length + sum(bucket)) * len(rows) for bucket, rows in plan)


class _TrainSource:
    """Random access from the global step to this process's slice of that step's batch."""

    def __init__(self, lesson: Lesson, layout: Layout, steps: Steps, share: Share):
        self._lesson, self._layout, self._steps, self._share = lesson, layout, steps, share
        own = layout.batch_size - lesson.replayed(layout.batch_size)
        self._per_epoch = layout.epoch_batches or steps_per_epoch(lesson.own, own)
        # Two epochs: prefetch threads read ahead across the border.
        self._plan = functools.lru_cache(maxsize=2)(functools.partial(epoch_plan, lesson, layout, seed=steps.seed))

    def __len__(self) -> int:
        return self._steps.stop

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(int(step), self._per_epoch)
        bucket, rows = self._plan(epoch=epoch)[place]
        lesson, layout, share = self._lesson, self._layout, self._share
        batch = make_batch(lesson.split, share.of(rows), bucket, layout)
        if not lesson.replay:
            return batch
        earlier, real = rows >= lesson.own, rows != FILLER

        def weights(targets: Ragged) -> np.ndarray:
            return share.of(row_weights(np.where(real, targets.lengths[rows], 0), earlier, lesson.replay, total))

        total = int(lesson.lengths[rows[real], 1].sum())
        batch["task"] = share.of(np.where(real, lesson.tasks[rows], np.int32(lesson.index)))
        batch["weight"] = weights(lesson.split.targets)
        if lesson.split.writing is not None and layout.texts is not None:
            cue, more = layout.texts
            texts = make_batch(lesson.split.writing, share.of(rows), (cue, sum(bucket) + more), layout)
            batch["writing"] = texts | {"weight": weights(lesson.split.writing.targets)}
        return batch


def train_batches(lesson: Lesson, layout: Layout, steps: Steps, share: Share, prefetch: Prefetch) -> Iterator[Batch]:
    """Yields the batches of a lesson's steps, read ahead by Grain's threads.

    Batch k is the same whatever `steps.start` was; it lies in epoch k // (batches of an epoch).

    Raises:
      ValueError: the batch does not split evenly over the processes.
    """
    share.of(np.arange(layout.batch_size))
    options = grain.ReadOptions(num_threads=prefetch.threads, prefetch_buffer_size=prefetch.batches)
    source = _TrainSource(lesson, layout, steps, share)
    dataset = grain.MapDataset.source(source).slice(slice(steps.start, None))
    return iter(dataset.to_iter_dataset(options))


def eval_batches(split: EncodedSplit, layout: Layout, share: Share) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (rows [b] int64 with -1 for filler, batch) over a split once, in a fixed order, the largest first.

    Every row comes exactly once over all processes. Only the source lengths of the buckets matter; every target is as
    wide as the widest bucket's, so decoding compiles once for each source length.
    """
    shapes = source_buckets(layout.buckets, max(target for _, target in layout.buckets))
    for bucket, rows in _cut_into_batches(np.arange(len(split)), split.lengths, shapes, layout.batch_size):
        own = share.of(rows)
        yield own, make_batch(split, own, bucket, layout)
