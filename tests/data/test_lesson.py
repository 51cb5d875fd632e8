"""Rows of earlier tasks in every batch: their share is exact, they are the same for the same seed, weights add up."""

import dataclasses

import numpy as np
import pytest

from sapt_jax.data import batching
from sapt_jax.data.encoding import join
from sapt_jax.data.lesson import check_share, epoch_rows, make_lesson, row_weights
from tests.helpers.replayed import SHARE, batches, split_of, third_task, with_texts

NAMES = ("source", "source_mask", "target", "target_mask", "task", "weight")


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in NAMES:
            np.testing.assert_array_equal(a[name], b[name])


def numbers(batch):
    """(task, row) of every row that is no filler, read off its tokens."""
    return [
        divmod(int(ids[0]), 1000) for ids, mask in zip(batch["source"], batch["source_mask"], strict=True) if mask[0]
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_share_is_exact_and_own_rows_come_once_an_epoch(seed):
    lesson, splits = third_task(seed)
    per_epoch = batching.steps_per_epoch(21, 6)
    made = batches(lesson, steps=2 * per_epoch)
    for batch in made:
        assert set(batch) == set(NAMES) and batch["task"].dtype == np.int32 and batch["weight"].dtype == np.float32
        rows = numbers(batch)
        assert sum(task < 2 for task, _ in rows) == 2
        real = batch["source_mask"].any(axis=1)
        assert [task for task, _ in rows] == batch["task"][real].tolist()
        for task, row in rows:
            place = rows.index((task, row))
            target = batch["target"][real][place][batch["target_mask"][real][place]]
            np.testing.assert_array_equal(target, splits[task].targets[row])
        assert (batch["task"][~real] == 2).all() and not batch["weight"][~real].any()
    for epoch in (made[:per_epoch], made[per_epoch:]):
        own = sorted(row for batch in epoch for task, row in numbers(batch) if task == 2)
        assert own == list(range(21))


@pytest.mark.slow
def test_batches_depend_on_seed_and_step_alone():
    lesson, _ = third_task(4)
    whole = batches(lesson)
    assert_same(whole, batches(lesson))
    for start in (1, 5, 11):
        assert_same(batches(lesson, start=start), whole[start:])
    other = batches(lesson, seed=4)
    assert [numbers(batch) for batch in other] != [numbers(batch) for batch in whole]
    earlier = [tuple(row for row in numbers(batch) if row[0] < 2) for batch in whole]
    assert len(set(earlier)) > 1


@pytest.mark.slow
def test_processes_share_a_batch():
    lesson, _ = third_task(5, texts=True)
    whole, parts = batches(lesson), [batches(lesson, process=(i, 2)) for i in range(2)]
    joined = [{name: np.concatenate([part[step][name] for part in parts]) for name in NAMES} for step in range(12)]
    assert_same(joined, [{name: batch[name] for name in NAMES} for batch in whole])
    for step, batch in enumerate(whole):
        for name in (*NAMES[:4], "weight"):
            texts = np.concatenate([part[step]["writing"][name] for part in parts])
            np.testing.assert_array_equal(texts, batch["writing"][name])


@pytest.mark.slow
def test_tasks_are_drawn_alike_and_shapes_are_those_of_the_buckets():
    lesson, _ = third_task(6, rows=(60, 40, 2))
    made = batches(lesson, steps=100)
    drawn = [row for batch in made for row in numbers(batch) if row[0] < 2]
    of_first = sum(task == 0 for task, _ in drawn)
    # 200 draws: five standard deviations are 35.
    assert len(drawn) == 200 and abs(of_first - 100) < 35
    assert len({row for task, row in drawn if task == 0}) > 30
    assert len({batch["source"].shape + batch["target"].shape for batch in made}) <= 3
    # Long rows go together: less padding than where every batch took the largest shape.
    sizes = [batch["source"].size for batch in made]
    assert np.mean(sizes) < 0.9 * max(sizes)


@pytest.mark.parametrize("seed", range(3))
def test_weights_sum_to_the_number_of_answer_tokens(seed):
    lesson, splits = third_task([7, seed], texts=True)
    for batch in batches(lesson):
        total = batch["target_mask"].sum()
        for part in (batch, batch["writing"]):
            counted = np.float64(part["weight"]) * part["target_mask"].sum(axis=1)
            np.testing.assert_allclose(counted.sum(), total, rtol=1e-6)
            np.testing.assert_allclose(counted[batch["task"] < 2].sum(), SHARE * total, rtol=1e-6)
        texts = batch["writing"]
        assert texts["target"].shape[1] == batch["source"].shape[1] + batch["target"].shape[1] + 1
        assert texts["source"].shape[1] == 3
        for row in np.flatnonzero(batch["source_mask"].any(axis=1)):
            task, number = divmod(int(batch["source"][row, 0]), 1000)
            text = texts["target"][row][texts["target_mask"][row]]
            np.testing.assert_array_equal(text, splits[task].writing.targets[number])
            assert texts["source_mask"][row].sum() == task + 1


def test_without_earlier_rows_a_batch_is_the_task_s_own():
    rng = np.random.default_rng(8)
    split = split_of(rng, 21, 0)
    first, plain = make_lesson(0, {0: split}, {}, SHARE), make_lesson(0, {0: split}, {}, 0.0)
    for own, alone in zip(batches(first), batches(plain), strict=True):
        assert set(alone) == set(NAMES[:4])
        for name in alone:
            np.testing.assert_array_equal(own[name], alone[name])
        real = own["source_mask"].any(axis=1)
        np.testing.assert_array_equal(own["weight"], real.astype(np.float32))
        assert not own["task"].any()


def test_a_method_without_replay_gets_no_earlier_rows():
    rng = np.random.default_rng(9)
    split = split_of(rng, 6, 1)
    lesson = make_lesson(1, {1: split}, {0: split_of(rng, 3, 0)}, 0.0)
    assert lesson.split is split and lesson.own == 6


def test_weights_by_hand():
    lengths, earlier = np.array([2, 1, 0, 5]), np.array([False, False, False, True])
    found = row_weights(lengths, earlier, 0.25, 8)
    np.testing.assert_allclose(found, [0.75 / 3 * 8, 0.75 / 3 * 8, 0, 0.25 / 5 * 8])
    np.testing.assert_array_equal(row_weights(lengths[:3], earlier[:3], 0.25, 3), [1, 1, 0])
    np.testing.assert_array_equal(row_weights(lengths[3:], earlier[3:], 0.25, 5), [1])


@pytest.mark.parametrize("equal", [False, True])
def test_an_epoch_of_joint_tasks(equal):
    rng = np.random.default_rng(10)
    sizes = {0: 3, 1: 30, 2: 7}
    splits = {task: split_of(rng, rows, task) for task, rows in sizes.items()}
    lesson = make_lesson(2, splits, {}, 0.0, equal)
    assert lesson.own_tasks == (0, 1, 2) and lesson.own == 40
    epochs = np.split(np.array([numbers(batch) for batch in batches(lesson, steps=10)], object).reshape(-1, 2), 2)
    for epoch in epochs:
        counts = {
            task: np.bincount(epoch[epoch[:, 0] == task, 1].astype(int), minlength=rows) for task, rows in sizes.items()
        }
        if equal:
            assert sorted(found.sum() for found in counts.values()) == [13, 13, 14]
            assert all(found.max() - found.min() <= 1 for found in counts.values())
        else:
            assert all((found == 1).all() for found in counts.values())
    if equal:
        # A large task's rows are others in the next epoch.
        seen = [frozenset(epoch[epoch[:, 0] == 1, 1]) for epoch in epochs]
        assert seen[0] != seen[1]


def test_epoch_rows_of_one_task_are_a_permutation():
    rows = np.random.default_rng(11).permutation(9)
    np.testing.assert_array_equal(epoch_rows(rows, np.zeros(9, int)), rows)


def test_splits_are_joined_row_for_row():
    rng = np.random.default_rng(12)
    parts = [with_texts(rng, split_of(rng, rows, task), task) for task, rows in enumerate((3, 1, 4))]
    whole, row = join(parts), 0
    for part in parts:
        for i in range(len(part)):
            for of_whole, of_part in ((whole, part), (whole.writing, part.writing)):
                np.testing.assert_array_equal(of_whole.sources[row], of_part.sources[i])
                np.testing.assert_array_equal(of_whole.targets[row], of_part.targets[i])
            row += 1
    assert len(whole) == row
    taken = whole.take(np.array([7, 0]))
    np.testing.assert_array_equal(taken.writing.targets[0], parts[2].writing.targets[3])
    plain = dataclasses.replace(parts[0], writing=None)
    assert join([plain, parts[1]]).writing is None


@pytest.mark.parametrize(("share", "batch", "accumulation"), [(0.3, 8, 1), (0.01, 8, 1), (0.875, 8, 2), (1.0, 8, 1)])
def test_a_share_that_cannot_be_exact_is_refused(share, batch, accumulation):
    with pytest.raises(ValueError, match=f"a replay share of {share:g} in batches of config.train.batch_size=8"):
        check_share(share, batch, accumulation)
    check_share(0.25, 8, 1)
    check_share(0.1, 30, 3)
