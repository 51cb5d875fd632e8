"""What SAPT decides beyond the step: the warm start of the attention, and reflection on a withdrawn slot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.base import Samples, Seen
from sapt_jax.models.families import VARIANTS, make_model, parameters
from tests.helpers.tiny import tiny_method
from tests.helpers.trees import at, empty_frozen, fresh

MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
WIDTH, TASKS = MODEL.config.d_model, 3
BASE = {"token_embedder": {"embedding": jnp.zeros((5, WIDTH))}}


def two_tasks(seed, **fields):
    """After one task, at the start of the second: inputs of both are clusters that share most of their mean."""
    rng = np.random.default_rng(seed)
    common, apart = rng.normal(0, 2.0, WIDTH), rng.normal(0, 0.3, (2, WIDTH))
    old, new = (common + apart[i] + rng.normal(0, 0.05, (40, WIDTH)) for i in range(2))
    method = tiny_method(**{"reflection_batch": 8, "kl_ratio": 2.0, **fields})
    plain = tiny_method()
    frozen = empty_frozen(method, MODEL, BASE, TASKS)
    first = fresh(plain, MODEL, BASE, seed)
    frozen = method.end_task(frozen, first, {"target": jnp.asarray([1.0, 0.0, 0.0])}, at(0))
    second = fresh(plain, MODEL, BASE, seed + 1, previous=first)
    features = np.zeros((TASKS, 10, WIDTH), np.float32)
    features[0] = old[:10]
    samples = Samples(jnp.asarray(features), jnp.asarray([10, 0, 0]))
    return method, frozen, second, samples, jnp.asarray(old[10:], jnp.float32), jnp.asarray(new, jnp.float32)


def share(method, frozen, trainable, inputs, slot):
    return float(np.exp(method.log_weights(frozen, trainable, inputs, at(1)))[:, slot].mean())


@pytest.mark.slow
def test_warm_start_opens_the_new_slot_and_keeps_the_old_one():
    method, frozen, second, samples, old, new = two_tasks(0, warm_start_steps=200)
    assert share(method, frozen, second, new, 1) < 0.9
    seen = Seen(features=new, samples=samples)
    warm = second.replace(selector=jax.jit(method.warm_start)(jax.random.key(2), frozen, second, seen, at(1)))
    assert share(method, frozen, warm, new, 1) > 0.95
    # Inputs that were in no pool.
    assert share(method, frozen, warm, old, 0) > 0.95


@pytest.mark.slow
def test_a_task_begins_with_a_fresh_block_and_key_and_the_projection_of_the_task_before():
    method, frozen, second, samples, _, new = two_tasks(1)
    third = fresh(method, MODEL, BASE, 7, previous=second, frozen=frozen, task=at(2))
    before, after = second.selector, third.selector
    jax.tree.map(np.testing.assert_array_equal, before["query_projection"], after["query_projection"])
    assert not np.allclose(before["key"], after["key"])
    # The warm start moves the attention alone, and is asked for rows and samples only where it happens.
    assert method.rows_before == 0
    warm = two_tasks(1, warm_start_steps=5)[0]
    assert warm.rows_before == 256
    seen = Seen(features=new, samples=samples)
    moved = fresh(warm, MODEL, BASE, 7, previous=second, frozen=frozen, seen=seen, task=at(2))
    jax.tree.map(np.testing.assert_array_equal, moved.slot, third.slot)
    assert not np.allclose(moved.selector["key"], third.selector["key"])


@pytest.mark.slow
def test_weights_of_the_ablations():
    method, frozen, second, _, old, _ = two_tasks(3)
    attention = np.exp(method.log_weights(frozen, second, old, at(1)))
    for training in (True, False):
        np.testing.assert_allclose(method.weights(frozen, second, old, at(1), training), attention, rtol=1e-5)
    assert 0 < attention[:, 1].min() and (attention[:, 2] == 0).all()
    for kind, expected in (("own", [0, 1, 0]), ("mean", [0.5, 0.5, 0])):
        found = tiny_method(learning=kind).weights(frozen, second, old, at(1), training=True)
        np.testing.assert_array_equal(found, np.tile(np.array(expected, np.float32), (len(old), 1)))
    withdrawn = frozen.replace(enabled=jnp.asarray([False, True, True]))
    alone = tiny_method(selection="mean").weights(withdrawn, second, old, at(1), training=False)
    np.testing.assert_array_equal(alone[0], [0, 1, 0])


@pytest.mark.slow
def test_learning_alone_moves_no_attention_through_the_weights():
    method, frozen, second, _, old, _ = two_tasks(4, learning="own")

    def gradient(method):
        def total(trainable):
            return jnp.sum(method.weights(frozen, trainable, old, at(1), training=True)[:, 1])

        return jax.grad(total)(second).selector

    assert not any(np.any(x) for x in jax.tree.leaves(gradient(method)))
    assert np.any(gradient(tiny_method())["key"])


@pytest.mark.slow
def test_what_was_recorded_on_a_withdrawn_slot_goes_to_the_others():
    method, frozen, second, _, old, _ = two_tasks(2)

    def with_row(row):
        targets = frozen.memory["reflection_targets"].at[1].set(jnp.asarray(row))
        memory = {**frozen.memory, "reflection_targets": targets}
        return frozen.replace(memory=memory, enabled=jnp.asarray([True, False, True]))

    samples = Samples(jnp.broadcast_to(old[:10], (TASKS, 10, WIDTH)), jnp.asarray([0, 10, 0]))
    third = fresh(method, MODEL, BASE, 5, previous=second)
    loss, logged = method.penalty(jax.random.key(3), with_row([0.25, 0.5, 0.25]), third, samples, at(2))
    again, _ = method.penalty(jax.random.key(3), with_row([0.5, 0.0, 0.5]), third, samples, at(2))
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    assert np.isfinite(loss) and loss > 0
    np.testing.assert_allclose(logged["reflection_loss"] * 2.0, loss, rtol=1e-6)


@pytest.mark.slow
def test_the_first_update_may_go_without_reflection():
    method, frozen, second, samples, _, _ = two_tasks(5)
    late = dataclasses.replace(method, reflect_in_first_update=False)

    def gradient(method, step):
        task = at(1).replace(step=step)
        return jax.grad(lambda t: method.penalty(jax.random.key(3), frozen, t, samples, task)[0])(second)

    whole = gradient(method, jnp.int32(0))
    assert np.any(whole.selector["key"])
    assert not any(np.any(x) for x in jax.tree.leaves(gradient(late, jnp.int32(0))))
    # Where no update is counted, as in the warm start, nothing is left out.
    for step in (jnp.int32(1), None):
        jax.tree.map(np.testing.assert_array_equal, gradient(late, step), whole)


@pytest.mark.slow
def test_the_reflection_target_is_the_mean_attention_of_real_rows():
    method, frozen, second, _, old, new = two_tasks(6)
    table = jnp.concatenate([jnp.zeros((1, WIDTH)), old, new])

    def apply(base, source, method):
        return jnp.take(table, source, axis=0)

    source = np.array([[3], [50], [0], [7]], np.int32)
    batch = {"source": source, "source_mask": source > 0}
    totals = method.measure(apply, frozen, second, batch, at(1))
    totals = jax.tree.map(lambda x: np.asarray(x, np.float64), totals)
    target = method.summarise({}, totals)["target"]
    rows = np.exp(method.log_weights(frozen, second, table[source[[0, 1, 3], 0]], at(1)))
    np.testing.assert_allclose(target, rows.mean(axis=0), rtol=1e-6)
    rounded = dataclasses.replace(method, round_targets=True).summarise({}, totals)["target"]
    np.testing.assert_array_equal(rounded, np.asarray(jnp.asarray(target, jnp.bfloat16), np.float64))
    assert not np.array_equal(rounded, target)


def test_the_selector_is_what_the_attention_module_declares():
    leaves = tiny_method().selector(parameters(MODEL))
    assert {name: leaf.axes for name, leaf in leaves["query_projection"]["norm"].items()} == {
        "scale": ("query",),
        "bias": ("query",),
    }
    assert leaves["query_projection"]["down"]["kernel"].shape == (WIDTH, 6)
    assert leaves["key"].shape == (WIDTH,) and leaves["key"].axes == ("query",)


@pytest.mark.slow
def test_a_key_along_the_mean_query_begins_with_an_equal_share():
    method, frozen, second, _, _, new = two_tasks(8, key_start="query")
    assert method.rows_before == 256
    third = method.end_task(frozen, second, {"target": jnp.zeros(3)}, at(1)), at(2)
    for earlier, (kept, task) in enumerate([(frozen, at(1)), third], start=1):
        started = fresh(method, MODEL, BASE, 7, previous=second, frozen=kept, seen=Seen(features=new), task=task)
        log = np.asarray(method.log_weights(kept, started, new, task), np.float64)
        others = np.log(np.exp(log[:, :earlier]).sum(axis=1))
        np.testing.assert_allclose(np.mean(log[:, earlier] - others), -np.log(earlier), atol=1e-5)
        # Inputs of one cluster, so that their mean share is near that of their mean.
        np.testing.assert_allclose(np.exp(log[:, earlier]).mean(), 1 / (earlier + 1), atol=0.02)
        jax.tree.map(
            np.testing.assert_array_equal, started.selector["query_projection"], second.selector["query_projection"]
        )
    # A withdrawn slot has no share to count, and the first task has nothing to share with.
    alone = frozen.replace(enabled=jnp.asarray([False, True, True]))
    for kept, task in ((alone, at(1)), (frozen, at(0))):
        first, plain = (
            fresh(each, MODEL, BASE, 7, previous=second, frozen=kept, seen=Seen(features=new), task=task)
            for each in (method, tiny_method())
        )
        np.testing.assert_array_equal(first.selector["key"], plain.selector["key"])


def test_the_share_of_a_young_block_has_a_floor_that_falls():
    method, frozen, second, _, old, _ = two_tasks(9, young_steps=4)
    attention = np.exp(np.asarray(method.log_weights(frozen, second, old, at(1)), np.float64))
    for step, floor in ((0, 0.5), (1, 0.375), (3, 0.125), (4, 0.0), (9, 0.0)):
        found = method.weights(frozen, second, old, at(1).replace(step=jnp.int32(step)), training=True)
        expected = (1 - floor) * attention + floor * np.array([0, 1, 0])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        assert (np.asarray(found)[:, 1] >= floor).all()
    # Where nothing is trained there is no floor, nor by default.
    np.testing.assert_allclose(method.weights(frozen, second, old, at(1), training=False), attention, rtol=1e-5)
    young = at(1).replace(step=jnp.int32(0))
    np.testing.assert_allclose(tiny_method().weights(frozen, second, old, young, training=True), attention, rtol=1e-5)
