"""Batching: every row once, the same whatever the start, no process sees another's rows, masks tell the
lengths."""

import dataclasses
import itertools

import numpy as np
import pytest

from sapt_jax.data import batching
from sapt_jax.data.buckets import assign_buckets, check_buckets, choose_buckets, source_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.data.lesson import Lesson, make_lesson


def layout(buckets, batch_size=8, padding_side="left", pad_id=0):
    return batching.Layout(buckets, batch_size, padding_side, pad_id)


def random_split(rng, n, longest=(60, 12)) -> EncodedSplit:
    # Ids are unique over the whole split, so a token tells the row it came from.
    def ragged(most, start):
        lengths = rng.integers(1, most + 1, n)
        ids = np.arange(start, start + lengths.sum())
        return Ragged.from_rows(np.split(ids, np.cumsum(lengths)[:-1]))

    sources = ragged(longest[0], 1)
    return EncodedSplit(sources, ragged(longest[1], 1 + len(sources.ids)), 0, 0)


def random_buckets(rng, lengths):
    return choose_buckets(
        lengths, max_buckets=int(rng.integers(1, 7)), source_multiple=8, target_multiple=4, prompt_length=0
    )


def lesson_of(split, index=1):
    return split if isinstance(split, Lesson) else make_lesson(index, {index: split}, {}, 0.0)


def rows_of(batch, split) -> list[int]:
    """The rows a batch holds, found by their first source token; -1 for filler."""
    first = {int(split.sources[i][0]): i for i in range(len(split))}
    return [
        first[int(ids[mask][0])] if mask.any() else -1
        for ids, mask in zip(batch["source"], batch["source_mask"], strict=True)
    ]


def take(split, buckets, *, start=0, steps, batch_size=4, process=(0, 1), threads=2, per_epoch=None):
    own, share = batching.Steps(seed=3, start=start, stop=steps), batching.Share(*process)
    whole = dataclasses.replace(layout(buckets, batch_size), epoch_batches=per_epoch)
    return list(batching.train_batches(lesson_of(split), whole, own, share, batching.Prefetch(threads, batches=4)))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(8))
def test_every_row_once_per_epoch_in_a_constant_number_of_batches(trial):
    rng = np.random.default_rng([11, trial])
    n, batch_size = int(rng.integers(1, 90)), int(rng.integers(1, 9))
    split = random_split(rng, n)
    buckets = random_buckets(rng, split.lengths)
    for epoch in range(3):
        plan = batching.epoch_plan(lesson_of(split, 2), layout(buckets, batch_size), seed=trial, epoch=epoch)
        assert len(plan) == batching.steps_per_epoch(n, batch_size)
        rows = np.concatenate([rows for _, rows in plan])
        assert sorted(rows[rows != -1]) == list(range(n))
        assert all(len(rows) == batch_size for _, rows in plan)
        for bucket, rows in plan:
            assert (split.lengths[rows[rows != -1]] <= bucket).all()
            assert bucket in buckets


@pytest.mark.slow
def test_an_epoch_of_fewer_batches_leaves_out_other_rows_each_time():
    rng = np.random.default_rng(21)
    split = random_split(rng, 35)
    buckets = random_buckets(rng, split.lengths)
    steps = batching.whole_steps_per_epoch(35, 8, 4)
    assert steps == 4
    whole = take(split, buckets, steps=3 * steps, batch_size=8, per_epoch=steps)
    seen = [[row for batch in whole[e * steps : (e + 1) * steps] for row in rows_of(batch, split)] for e in range(3)]
    assert all(len(set(rows)) == 32 and -1 not in rows for rows in seen)
    assert len({frozenset(rows) for rows in seen}) == 3
    for start in (1, 5, 11):
        assert_same(take(split, buckets, start=start, steps=12, batch_size=8, per_epoch=steps), whole[start:])
    # A last batch that lacks no micro-batch stays.
    assert batching.whole_steps_per_epoch(31, 8, 4) == 4
    assert batching.whole_steps_per_epoch(3, 8, 4) == 1


@pytest.mark.slow
def test_epochs_tasks_and_seeds_shuffle_differently_and_the_same_key_alike():
    rng = np.random.default_rng(12)
    split = random_split(rng, 64)
    buckets = random_buckets(rng, split.lengths)

    def flat(task_index, **key):
        plan = batching.epoch_plan(lesson_of(split, task_index), layout(buckets), **key)
        return tuple(np.concatenate([rows for _, rows in plan]).tolist())

    keys = [dict(seed=s, task_index=t, epoch=e) for s, t, e in itertools.product(range(2), repeat=3)]
    assert len({flat(**key) for key in keys}) == len(keys)
    assert [flat(**key) for key in keys] == [flat(**key) for key in keys]


def test_rows_within_a_bucket_change_company_between_epochs():
    rng = np.random.default_rng(13)
    split = random_split(rng, 64)
    buckets = check_buckets([(64, 12)])

    def companies(epoch):
        plan = batching.epoch_plan(lesson_of(split), layout(buckets), seed=0, epoch=epoch)
        return {frozenset(rows.tolist()) for _, rows in plan}

    assert not companies(0) & companies(1)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 3])
def test_a_resumed_iterator_equals_the_uninterrupted_one(threads):
    rng = np.random.default_rng(14)
    split = random_split(rng, 37)
    buckets = random_buckets(rng, split.lengths)
    steps = 3 * batching.steps_per_epoch(37, 4) + 1
    whole = take(split, buckets, steps=steps, threads=threads)
    assert len(whole) == steps
    for start in (1, 10, steps - 1, steps):
        assert_same(take(split, buckets, start=start, steps=steps, threads=threads), whole[start:])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_partition_every_batch_and_agree_on_its_shape(count):
    rng = np.random.default_rng([15, count])
    split = random_split(rng, 41)
    buckets = random_buckets(rng, split.lengths)
    steps = 2 * batching.steps_per_epoch(41, 6)
    whole = take(split, buckets, steps=steps, batch_size=6)
    views = [take(split, buckets, steps=steps, batch_size=6, process=(i, count)) for i in range(count)]
    for step, batch in enumerate(whole):
        assert len({view[step]["source"].shape for view in views}) == 1
        joined = {name: np.concatenate([view[step][name] for view in views]) for name in batch}
        assert_same([joined], [batch])
    for epoch in np.split(np.arange(steps), 2):
        seen = [row for view in views for step in epoch for row in rows_of(view[step], split) if row != -1]
        assert sorted(seen) == list(range(41))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_covers_a_split_once_over_all_processes(count):
    rng = np.random.default_rng([16, count])
    split = random_split(rng, 29)
    buckets = random_buckets(rng, split.lengths)
    seen = []
    for index in range(count):
        for rows, batch in batching.eval_batches(split, layout(buckets, 6), batching.Share(index, count)):
            assert rows_of(batch, split) == rows.tolist()
            assert batch["source"].shape[1] in {ls for ls, _ in buckets}
            assert batch["target"].shape == (6 // count, 12)
            seen += rows[rows != -1].tolist()
    assert sorted(seen) == list(range(29))


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_match_lengths_and_filler_is_masked_everywhere(side):
    rng = np.random.default_rng(17)
    split = random_split(rng, 10)
    rows = np.array([3, -1, 7])
    batch = batching.make_batch(split, rows, (64, 16), layout([], padding_side=side, pad_id=-5))
    assert {name: array.dtype for name, array in batch.items()} == {
        "source": np.int32,
        "source_mask": bool,
        "target": np.int32,
        "target_mask": bool,
    }
    for name, ragged, padding in (("source", split.sources, side), ("target", split.targets, "right")):
        mask = batch[f"{name}_mask"]
        assert not mask[1].any()
        assert (batch[name][~mask] == -5).all()
        for i in (0, 2):
            own = ragged[int(rows[i])]
            np.testing.assert_array_equal(batch[name][i][mask[i]], own)
            assert mask[i].sum() == len(own)
            assert mask[i][-1 if padding == "left" else 0]
    with pytest.raises(ValueError, match="more than the batch's 1"):
        batching.make_batch(
            split, np.array([int(split.sources.lengths.argmax())]), (1, 16), layout([], padding_side=side)
        )
    with pytest.raises(ValueError, match="padding_side"):
        layout([], padding_side="middle")


def test_positions_count_filler_and_padding():
    plan = [((4, 2), np.array([0, 1])), ((8, 3), np.array([2, -1]))]
    split = random_split(np.random.default_rng(21), 3, longest=(4, 2))
    sizes = [batching.make_batch(split, rows, bucket, layout([])) for bucket, rows in plan]
    total = sum(batch["source"].size + batch["target"].size for batch in sizes)
    assert batching.count_positions(plan, 0) == total == 34


@pytest.mark.parametrize("trial", range(6))
def test_chosen_buckets_hold_every_row_and_more_buckets_pad_less(trial):
    rng = np.random.default_rng([18, trial])
    lengths = np.stack([rng.geometric(0.02, 200), rng.integers(1, 40, 200)], 1)
    shares = []
    for most in (1, 2, 4, 8, 16):
        buckets = choose_buckets(lengths, max_buckets=most, source_multiple=8, target_multiple=4, prompt_length=0)
        assert 1 <= len(buckets) <= most
        assert all(ls % 8 == 0 and lt % 4 == 0 for ls, lt in buckets)
        assert (lengths.max(0) <= buckets[-1]).all()
        assert (np.array(buckets) <= buckets[-1]).all()
        shapes = np.array(buckets)[assign_buckets(lengths, buckets)]
        assert (lengths <= shapes).all()
        shares.append(shapes.sum())
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]


def test_chosen_buckets_are_the_best_two_on_a_small_case():
    rng = np.random.default_rng(19)
    lengths = rng.integers(1, 25, (30, 2))
    chosen = choose_buckets(lengths, max_buckets=2, source_multiple=4, target_multiple=4, prompt_length=0)
    top = tuple(-(-lengths.max(0) // 4) * 4)

    def total(buckets):
        return np.array(buckets)[assign_buckets(lengths, buckets)].sum()

    every = [check_buckets([top, (ls, lt)]) for ls in range(4, 25, 4) for lt in range(4, 25, 4)]
    assert total(chosen) == min(total(buckets) for buckets in every)


@pytest.mark.parametrize("buckets", [(64, 16), ((64, 16, 2),), ((0, 16),), ()])
def test_buckets_that_are_no_pairs_of_lengths_are_named(buckets):
    with pytest.raises(ValueError, match="config.data.buckets=.* must be pairs of positive lengths"):
        check_buckets(buckets)


def test_buckets_leave_room_for_a_prompt():
    lengths = np.random.default_rng(3).integers(1, 90, (50, 2))
    buckets = choose_buckets(lengths, max_buckets=4, source_multiple=16, target_multiple=4, prompt_length=10)
    assert all((source + 10) % 16 == 0 and target % 4 == 0 for source, target in buckets)
    assert (lengths.max(axis=0) <= np.array(buckets[-1])).all()
    ragged = [Ragged.from_rows([range(n) for n in side]) for side in lengths.T]
    plan = batching.epoch_plan(lesson_of(EncodedSplit(*ragged, 0, 0)), layout(buckets), seed=0, epoch=0)
    rows = sum(len(own) for _, own in plan)
    assert batching.count_positions(plan, 10) == batching.count_positions(plan, 0) + 10 * rows


def test_fewer_shapes_than_buckets_give_each_shape_its_own():
    lengths = np.array([[8, 4], [16, 4], [16, 4], [24, 8]])
    buckets = choose_buckets(lengths, max_buckets=9, source_multiple=8, target_multiple=4, prompt_length=0)
    assert buckets == [(8, 4), (16, 4), (24, 8)]


def test_bucket_errors_name_what_to_change():
    with pytest.raises(ValueError, match=r"add \(64, 16\)"):
        check_buckets([(64, 8), (32, 16)])
    with pytest.raises(ValueError, match="positive"):
        check_buckets([])
    with pytest.raises(ValueError, match="33 source and 2 target .* fits none"):
        assign_buckets(np.array([[3, 2], [33, 2]]), [(32, 8)])
    with pytest.raises(ValueError, match="at least 1"):
        choose_buckets(np.zeros((0, 2), int), max_buckets=3, source_multiple=8, target_multiple=8, prompt_length=0)
    assert source_buckets([(32, 8), (32, 16), (64, 16)], 50) == [(32, 50), (64, 50)]


def test_process_errors_name_what_to_change():
    split = random_split(np.random.default_rng(20), 5)
    buckets = [(64, 12)]
    with pytest.raises(ValueError, match="change batch_size"):
        take(split, buckets, steps=1, batch_size=4, process=(0, 3))
    with pytest.raises(ValueError, match="not one of 2 processes"):
        take(split, buckets, steps=1, batch_size=4, process=(2, 2))
