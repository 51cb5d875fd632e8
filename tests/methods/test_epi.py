"""EPI's memory and routing against NumPy in float64, on features of both model families."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import state
from sapt_jax.methods.epi import Epi
from sapt_jax.models.families import VARIANTS, make_model, parameters
from sapt_jax.pet import Lora
from sapt_jax.programs import make_apply
from tests.helpers import routing
from tests.helpers.trees import at, empty_frozen, init_base

METHOD = Epi(Lora(2, 8.0))
MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
WIDTH = MODEL.config.d_model
BASE = {"token_embedder": {"embedding": jnp.zeros((5, WIDTH))}}


def clusters(seed, tasks=3, rows=60):
    """Features [rows, D] of each task: of the same spread, which is wide in a few directions, around near means."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(WIDTH, WIDTH)) * np.geomspace(3.0, 0.05, WIDTH)
    means = 0.4 * rng.normal(size=(tasks, WIDTH))
    return [mean + rng.normal(size=(rows, WIDTH)) @ spread.T for mean in means]


def sums_of(features):
    return {"sum": features.sum(axis=0), "outer": features.T @ features, "rows": len(features)}


def learned(tasks):
    """The frozen tree after tasks whose inputs have these features."""
    return routing.learned(METHOD, MODEL, BASE, [lambda *_, own=own: sums_of(own) for own in tasks])


choices = functools.partial(routing.choices, METHOD)


@pytest.mark.slow
def test_memory_and_choices_equal_numpy():
    tasks = clusters(0)
    frozen = learned(tasks)
    covariance = sum(np.cov(features, rowvar=False, bias=True) for features in tasks)
    means = np.stack([features.mean(axis=0) for features in tasks])
    np.testing.assert_allclose(frozen.memory["means"], means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(frozen.memory["covariance"], covariance, rtol=1e-4, atol=1e-5)
    rows = np.concatenate([features + 0.1 for features in clusters(0, rows=80)])
    apart = rows[:, None] - means
    distances = np.einsum("BTD,DE,BTE->BT", apart, np.linalg.inv(covariance), apart)
    found = choices(frozen, rows, 2)
    clear = np.diff(np.sort(distances, axis=1)[:, :2])[:, 0] > 1e-2 * distances.min(axis=1)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], distances.argmin(axis=1)[clear])
    # Nearest means alone would choose otherwise: the spread is what tells the tasks apart.
    assert (found != np.square(apart).sum(axis=2).argmin(axis=1)).mean() > 0.1


def test_the_order_of_tasks_does_not_matter():
    first, second = clusters(1, tasks=2)
    one, other = learned([first, second]).memory, learned([second, first]).memory
    np.testing.assert_array_equal(np.sort(one["means"][:2], axis=0), np.sort(other["means"][:2], axis=0))
    np.testing.assert_allclose(one["covariance"], other["covariance"], rtol=1e-6, atol=1e-7)
    largest = np.abs(one["precision"]).max()
    np.testing.assert_allclose(one["precision"], other["precision"], atol=1e-3 * largest)


def test_a_task_s_mean_is_routed_to_it_among_the_tasks_seen():
    frozen = learned(clusters(2))
    np.testing.assert_array_equal(choices(frozen, frozen.memory["means"], 2), [0, 1, 2])
    assert set(choices(frozen, frozen.memory["means"], 1)) <= {0, 1}
    withdrawn = frozen.replace(enabled=jnp.asarray([True, False, True]))
    assert 1 not in choices(withdrawn, frozen.memory["means"], 2)


@pytest.mark.slow
def test_a_task_in_training_takes_its_own_block_whatever_the_input():
    frozen = learned(clusters(3)[:1])
    rows = np.asarray(frozen.memory["means"][:1])
    assert choices(frozen, rows, 1, training=True).tolist() == [1]
    assert choices(frozen, rows, 1, steps=10).tolist() == [1]
    # Its slot has no mean yet: the first task's row goes to the first task.
    assert choices(frozen, rows, 0).tolist() == [0]


def test_a_withdrawn_task_answers_nothing_also_where_it_is_the_only_one():
    frozen = learned(clusters(3)[:2])
    frozen = frozen.replace(enabled=jnp.asarray([False, True, True]))
    rows = frozen.memory["means"][:1]
    assert choices(frozen, rows, 1).tolist() == [1]
    assert METHOD.weights(frozen, None, rows, at(0, steps=0), training=False).tolist() == [[0.0, 0.0, 0.0]]


def test_fewer_rows_than_features_are_enough():
    tasks = [features[:7] for features in clusters(4)]
    frozen = learned(tasks)
    assert np.isfinite(frozen.memory["precision"]).all()
    np.testing.assert_array_equal(choices(frozen, frozen.memory["means"], 2), [0, 1, 2])


@pytest.mark.slow
def test_a_bank_that_grew_routes_as_before():
    tasks = clusters(5)
    frozen = learned(tasks)
    rows = np.concatenate(tasks)
    grown = state.grow(frozen, METHOD.frozen_leaves(parameters(MODEL), 6))
    np.testing.assert_array_equal(choices(grown, rows, 2), choices(frozen, rows, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny"])
def test_features_are_the_mean_of_the_bare_model_s_last_states(name):
    model = make_model(VARIANTS[name], "float32", "none")
    base = init_base(model)
    rng = np.random.default_rng(6)
    lengths = np.array([4, 7, 2])
    mask = np.arange(7) >= 7 - lengths[:, None] if model.padding_side == "left" else np.arange(7) < lengths[:, None]
    source = np.where(mask, rng.integers(3, 90, mask.shape), 0).astype(np.int32)
    features = METHOD.features(make_apply(model), base, source, mask)
    for row in range(3):
        ids = source[row][mask[row]][None]
        states = make_apply(model)(base, ids, np.ones(ids.shape, bool), method="encode")
        np.testing.assert_allclose(features[row], np.array(states[0]).mean(axis=0), atol=1e-5)


def test_the_sums_of_a_pass_leave_filler_rows_out():
    rng = np.random.default_rng(7)
    table = rng.normal(size=(9, WIDTH)).astype(np.float32)

    def apply(base, source, mask, method):
        return jnp.take(jnp.asarray(table), source, axis=0)

    source = np.array([[3, 4], [5, 0], [0, 0]], np.int32)
    totals = METHOD.measure(
        apply, empty_frozen(METHOD, MODEL, BASE, 1), None, {"source": source, "source_mask": source > 0}, at(0)
    )
    rows = np.stack([table[[3, 4]].mean(axis=0), table[5]]).astype(np.float64)
    assert totals["rows"] == 2
    np.testing.assert_allclose(totals["sum"], rows.sum(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(totals["outer"], rows.T @ rows, rtol=1e-5, atol=1e-6)
