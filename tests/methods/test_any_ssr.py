"""Any-SSR's sums and routing against NumPy in float64, on features of both model families."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual, state
from sapt_jax.methods.any_ssr import AnySsr
from sapt_jax.models.families import VARIANTS, make_model, parameters
from sapt_jax.pet import Lora
from sapt_jax.programs import make_apply
from tests.helpers import routing
from tests.helpers.run_files import committed
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at, fresh, init_base

METHOD = AnySsr(Lora(2, 8.0), layer=1, expansion=96, gamma=3.0)
MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
WIDTH = MODEL.config.d_model
BASE = {"token_embedder": {"embedding": jnp.zeros((5, WIDTH))}}


def clusters(seed, tasks=3, rows=60, scale=1.0):
    """Features [rows, D] of each task, around means of their own."""
    rng = np.random.default_rng(seed)
    return [scale * (rng.normal(size=WIDTH) + 0.7 * rng.normal(size=(rows, WIDTH))) for _ in range(tasks)]


def phi_of(features):
    """ReLU(h Omega) in float64."""
    eye = jnp.eye(WIDTH)
    omega = np.array(METHOD.expand(eye), np.float64) - np.array(METHOD.expand(-eye), np.float64)
    assert 0.9 < omega.std() * WIDTH**0.5 < 1.1 and np.abs(omega.mean()) < 0.01
    return np.maximum(features @ omega, 0.0)


def sums_of(frozen, task, *, features):
    """What a pass over rows of these features adds up to, in batches of which the last is filled up."""

    def apply(base, source, mask, layers, method):
        assert (layers, method) == (1, "encode")
        return jnp.take(jnp.asarray(features, jnp.float32), source, axis=0)

    rows = np.arange(-(-len(features) // 16) * 16).reshape(-1, 16, 1)
    batches = [{"source": np.minimum(own, len(features) - 1), "source_mask": own < len(features)} for own in rows]
    totals = [METHOD.measure(apply, frozen, None, batch, at(task)) for batch in batches]
    return jax.tree.map(lambda *parts: np.sum([np.asarray(x, np.float64) for x in parts], axis=0), *totals)


def learned(tasks, capacity=3):
    """The frozen tree after tasks whose inputs have these features."""
    sums = [functools.partial(sums_of, features=features) for features in tasks]
    return routing.learned(METHOD, MODEL, BASE, sums, capacity)


choices = functools.partial(routing.choices, METHOD)


@pytest.mark.slow
def test_sums_router_and_choices_equal_numpy():
    tasks = clusters(0, rows=37)
    frozen = learned(tasks)
    phi = [phi_of(features) for features in tasks]
    gram = sum(np.outer(row, row) for own in phi for row in own)
    cross = np.stack([sum(row for row in own) for own in phi], axis=1)
    router = np.linalg.inv(gram + 3.0 * np.eye(96)) @ cross
    size = np.abs(gram).max()
    np.testing.assert_allclose(frozen.memory["gram"] / size, gram / size, atol=1e-6)
    np.testing.assert_allclose(frozen.memory["cross"], cross, rtol=1e-5)
    np.testing.assert_allclose(frozen.memory["router"], router, atol=1e-5)
    rows = np.concatenate(clusters(1, rows=80))
    expected = phi_of(rows) @ router
    np.testing.assert_allclose(METHOD.fit_of_slots(frozen, jnp.asarray(rows, jnp.float32)), expected, atol=1e-4)
    clear = np.diff(np.sort(expected, axis=1)[:, -2:])[:, 0] > 1e-3
    assert clear.mean() > 0.9 and len(set(choices(frozen, rows, 2))) > 1
    np.testing.assert_array_equal(choices(frozen, rows, 2)[clear], expected.argmax(axis=1)[clear])


@pytest.mark.slow
def test_the_order_of_tasks_does_not_matter():
    first, second = clusters(2, tasks=2)
    one, other = learned([first, second]).memory, learned([second, first]).memory
    np.testing.assert_allclose(one["gram"], other["gram"], rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(one["cross"][:, [1, 0, 2]], other["cross"], rtol=1e-6)
    np.testing.assert_allclose(one["router"][:, [1, 0, 2]], other["router"], atol=1e-6)


@pytest.mark.slow
def test_rows_and_means_are_routed_to_their_task_among_the_tasks_seen():
    tasks = clusters(3)
    frozen = learned(tasks)
    means = np.stack([features.mean(axis=0) for features in tasks])
    np.testing.assert_array_equal(choices(frozen, means, 2), [0, 1, 2])
    assert (choices(frozen, np.concatenate(tasks), 2) == np.repeat([0, 1, 2], 60)).mean() > 0.95
    assert set(choices(frozen, means, 1)) <= {0, 1}
    withdrawn = frozen.replace(enabled=jnp.asarray([True, False, True]))
    assert 1 not in choices(withdrawn, means, 2)


def test_a_task_in_training_takes_its_own_block_whatever_the_input():
    tasks = clusters(4)
    frozen = learned(tasks[:1])
    assert set(choices(frozen, tasks[0], 1, training=True)) == {1}
    assert set(choices(frozen, tasks[0], 1, steps=10)) == {1}
    assert set(choices(frozen, tasks[0], 0)) == {0}


@pytest.mark.slow
def test_a_bank_that_grew_routes_as_before_and_takes_more_tasks():
    tasks = clusters(5, tasks=4)
    frozen = learned(tasks[:3])
    rows = np.concatenate(tasks)
    grown = state.grow(frozen, METHOD.frozen_leaves(parameters(MODEL), 5))
    np.testing.assert_array_equal(choices(grown, rows, 2), choices(frozen, rows, 2))
    whole = learned(tasks, capacity=5)
    sums = sums_of(grown, 3, features=tasks[3])
    after = routing.end(METHOD, grown, sums, 3, fresh(METHOD, MODEL, BASE, 3))
    jax.tree.map(np.testing.assert_array_equal, after.memory, whole.memory)


def test_features_so_large_that_sums_are_coarser_than_the_ridge_are_still_told_apart():
    tasks = clusters(6, scale=1e4)
    frozen = learned(tasks)
    assert np.finfo(np.float32).eps * np.trace(frozen.memory["gram"]) > 3.0
    means = np.stack([features.mean(axis=0) for features in tasks])
    np.testing.assert_array_equal(choices(frozen, means, 2), [0, 1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny"])
def test_features_are_the_mean_of_a_low_layer_s_states_without_padding(name):
    model = make_model(VARIANTS[name], "float32", "none")
    base, apply = init_base(model), make_apply(model)
    rng = np.random.default_rng(7)
    lengths = np.array([4, 7, 2])
    mask = np.arange(7) >= 7 - lengths[:, None] if model.padding_side == "left" else np.arange(7) < lengths[:, None]
    source = np.where(mask, rng.integers(3, 90, mask.shape), 0).astype(np.int32)
    features = METHOD.features(apply, base, source, mask)
    for row in range(3):
        ids = source[row][mask[row]][None]
        states = np.array(apply(base, ids, np.ones(ids.shape, bool), 1, method="encode"), np.float64)
        np.testing.assert_allclose(features[row], states[0].mean(axis=0), atol=1e-5)
    # A layer that the model has not is its last.
    deep = AnySsr(Lora(2, 8.0), layer=99).features(apply, base, source, mask)
    assert np.isfinite(deep).all() and np.abs(deep - features).max() > 1e-3


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    overrides = {"method": "any_ssr", "any_ssr.expansion": 64, "train.epochs": 1, "task_order": "shout,mirror"}
    scores = continual.run(tiny_config(write_tasks(tmp_path / "data"), **overrides), tmp_path / "run")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    first, last = committed(tmp_path / "run").values()
    assert last["['memory']['router']"].shape == (64, 2)
    assert not np.any(first["['memory']['router']"][:, 1]) and np.any(last["['memory']['router']"][:, 1])
    np.testing.assert_array_equal(first["['memory']['cross']"][:, 0], last["['memory']['cross']"][:, 0])
