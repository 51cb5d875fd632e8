"""What the batches of a task are made of: its own rows, and a fixed share of rows of earlier tasks."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from sapt_jax.data.buckets import Bucket, assign_buckets
from sapt_jax.data.encoding import EncodedSplit, join


@dataclasses.dataclass(frozen=True)
class Lesson:
    """The rows that are trained on at one place of the sequence. It never changes, and neither do its batches.

    Attributes:
      index: its place, from 0.
      split: its own rows, and then those that are kept of earlier tasks.
      tasks: [n] int32, the place of the task that each row is of.
      own: how many are its own; an epoch goes through them.
      replay: the share of a batch that rows of earlier tasks fill where there are any; 0 for a method without replay.
      equal: of several own tasks, an epoch has equally many rows, and as many as all tasks have together.
    """

    index: int
    split: EncodedSplit
    tasks: np.ndarray
    own: int
    replay: float = 0.0
    equal: bool = False

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[n, 2] source and target length of every row."""
        return self.split.lengths

    @property
    def own_tasks(self) -> tuple[int, ...]:
        """The places of the tasks that its own rows are of."""
        return tuple(np.unique(self.tasks[: self.own]).tolist())

    def replayed(self, batch_size: int) -> int:
        """Rows of a batch that are of earlier tasks."""
        return round(self.replay * batch_size) if len(self.split) > self.own else 0


def make_lesson(
    index: int, own: Mapping[int, EncodedSplit], earlier: Mapping[int, EncodedSplit], replay: float, equal: bool = False
) -> Lesson:
    """The lesson of the tasks `own`, with rows that are kept of `earlier` ones; both by place in the sequence."""
    parts = {**own, **(earlier if replay else {})}
    tasks = np.repeat(np.array(list(parts), np.int32), [len(part) for part in parts.values()])
    return Lesson(index, join(list(parts.values())), tasks, sum(map(len, own.values())), replay, equal)


def check_share(replay: float, batch_size: int, accumulation: int) -> None:
    """Checks that rows of earlier tasks can fill this share of every batch exactly.

    Raises:
      ValueError: they cannot, or would leave no room for rows of the task.
    """
    rows = replay * batch_size
    if not (abs(rows - round(rows)) < 1e-6 and 1 <= round(rows) <= batch_size - accumulation):
        raise ValueError(
            f"a replay share of {replay:g} in batches of config.train.batch_size={batch_size} is {rows:g} rows: choose "
            f"a share that is a whole number of them, from 1 to {batch_size - accumulation}."
        )


def epoch_rows(rows: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """As many of the shuffled `rows` as there are, the same number of each task but for one: small tasks come again.

    Args:
      rows: [n] a permutation.
      tasks: [n] the task of row i.
    """
    names = np.unique(tasks)
    shares = np.full(len(names), len(rows) // len(names))
    shares[: len(rows) % len(names)] += 1
    return np.concatenate(
        [np.resize(rows[tasks[rows] == name], share) for name, share in zip(names, shares, strict=True)]
    )


def mix_in(
    plan: Sequence[tuple[Bucket, np.ndarray]], lesson: Lesson, buckets: Sequence[Bucket], key: Sequence[int], rows: int
) -> list[tuple[Bucket, np.ndarray]]:
    """The plan of an epoch with `rows` rows of earlier tasks at the end of every batch.

    They are drawn for the epoch: first the task, uniformly, then a row of it. Long ones go into the batches that have
    long rows already, so that little padding is added. Each batch gets the cheapest shape that holds all of its rows.

    Args:
      key: of the random numbers.
    """
    rng, tasks = np.random.default_rng(list(key)), lesson.tasks[lesson.own :]
    names, starts, counts = np.unique(tasks, return_index=True, return_counts=True)
    chosen = rng.integers(len(names), size=len(plan) * rows)
    drawn = lesson.own + starts[chosen] + rng.integers(counts[chosen])
    drawn = drawn[np.argsort(assign_buckets(lesson.lengths[drawn], buckets), kind="stable")]
    mixed = list(plan)
    smallest_first = sorted(range(len(plan)), key=lambda place: sum(plan[place][0]))
    for place, earlier in zip(smallest_first, drawn.reshape(-1, rows), strict=True):
        together = np.concatenate([plan[place][1], earlier])
        longest = lesson.lengths[together[together >= 0]].max(axis=0, keepdims=True)
        mixed[place] = buckets[assign_buckets(longest, buckets)[0]], together
    return mixed


def row_weights(lengths: np.ndarray, earlier: np.ndarray, replay: float, total: int) -> np.ndarray:
    """Weights [B] float32 of rows' tokens in the loss: those of earlier tasks count for the share `replay` of it.

    However long the answers of either are: weight times length sums to replay * total over the rows of earlier tasks
    and to (1 - replay) * total over the others; without either kind to all of it over the other.

    Args:
      lengths: [B] tokens of each row, 0 on filler.
      earlier: [B] bool.
      total: what all of them sum to.
    """
    own_tokens, earlier_tokens = lengths[~earlier].sum(), lengths[earlier].sum()
    if not own_tokens or not earlier_tokens:
        replay = 1.0 if earlier_tokens else 0.0
    share = np.where(earlier, replay / max(earlier_tokens, 1), (1 - replay) / max(own_tokens, 1))
    return np.where(lengths > 0, share * total, 0.0).astype(np.float32)
