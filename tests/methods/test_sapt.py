"""What SAPT decides beyond the step: the warm start of the attention, and reflection on a withdrawn slot."""

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.methods.base import Pools
from sapt_jax.state import commit, init_frozen
from tests.helpers.tiny import tiny_method

SITES = {"decoder": {"self_attention": {"query": (1, 16, 16), "value": (1, 16, 16)}}}
WIDTH, TASKS = 16, 3
TABLE = jnp.zeros((5, WIDTH))


def two_tasks(seed, **fields):
    """After one task, at the start of the second: inputs of both are clusters that share most of their mean."""
    rng = np.random.default_rng(seed)
    common, apart = rng.normal(0, 2.0, WIDTH), rng.normal(0, 0.3, (2, WIDTH))
    old, new = (common + apart[i] + rng.normal(0, 0.05, (40, WIDTH)) for i in range(2))
    method = tiny_method(reflection_batch=8, kl_ratio=2.0, **fields)
    frozen = init_frozen(None, method.pet, SITES, WIDTH, TASKS)
    first = method.open_task(jax.random.key(seed), SITES, TABLE, None)
    frozen = commit(frozen, first, jnp.asarray([1.0, 0.0, 0.0]), 0)
    second = method.open_task(jax.random.key(seed + 1), SITES, TABLE, first)
    pooled = np.zeros((TASKS, 10, WIDTH), np.float32)
    pooled[0] = old[:10]
    pools = Pools(jnp.asarray(pooled), jnp.asarray([10, 0, 0]))
    return method, frozen, second, pools, jnp.asarray(old[10:], jnp.float32), jnp.asarray(new, jnp.float32)


def share(method, frozen, trainable, inputs, slot):
    return float(np.exp(method.log_weights(frozen, trainable, inputs, 1))[:, slot].mean())


def test_warm_start_opens_the_new_slot_and_keeps_the_old_one():
    method, frozen, second, pools, old, new = two_tasks(0, warm_start_steps=200)
    assert share(method, frozen, second, new, 1) < 0.9
    warm = jax.jit(method.warm_start)(jax.random.key(2), frozen, second, new, pools, 1)
    assert share(method, frozen, warm, new, 1) > 0.95
    # Inputs that were in no pool.
    assert share(method, frozen, warm, old, 0) > 0.95
    jax.tree.map(np.testing.assert_array_equal, warm.slot, second.slot)


def test_without_steps_there_is_no_warm_start():
    method, frozen, second, pools, _, new = two_tasks(1)
    assert method.warm_start(jax.random.key(2), frozen, second, new, pools, 1) is second


def test_weights_of_the_ablations():
    method, frozen, second, _, old, _ = two_tasks(3)
    frozen = frozen.replace(enabled=jnp.asarray([True, True, True]))
    attention = np.exp(method.log_weights(frozen, second, old, 1))
    np.testing.assert_allclose(method.learning_weights(frozen, second, old, 1), attention, rtol=1e-5)
    np.testing.assert_allclose(method.selection_weights(frozen, second, old, 1), attention, rtol=1e-5)
    assert 0 < attention[:, 1].min() and (attention[:, 2] == 0).all()
    for kind, expected in (("own", [0, 1, 0]), ("mean", [0.5, 0.5, 0])):
        found = tiny_method(learning=kind).learning_weights(frozen, second, old, 1)
        np.testing.assert_array_equal(found, np.tile(np.array(expected, np.float32), (len(old), 1)))
    alone = tiny_method(selection="mean").selection_weights(
        frozen.replace(enabled=jnp.asarray([False, True, True])), second, old, 1
    )
    np.testing.assert_array_equal(alone[0], [0, 1, 0])


def test_learning_alone_moves_no_attention_through_the_weights():
    method, frozen, second, _, old, _ = two_tasks(4, learning="own")

    def total(trainable):
        return jnp.sum(method.learning_weights(frozen, trainable, old, 1)[:, 1])

    gradient = jax.grad(total)(second)
    assert not any(np.any(x) for x in jax.tree.leaves((gradient.key, gradient.query_projection)))
    gradient = jax.grad(lambda t: jnp.sum(tiny_method().learning_weights(frozen, t, old, 1)[:, 1]))(second)
    assert np.any(gradient.key)


def test_what_was_recorded_on_a_withdrawn_slot_goes_to_the_others():
    method, frozen, second, pools, old, new = two_tasks(2)
    targets = frozen.targets.at[1].set(jnp.asarray([0.25, 0.5, 0.25]))
    pools = Pools(jnp.broadcast_to(old[:10], (TASKS, 10, WIDTH)), jnp.asarray([0, 10, 0]))
    withdrawn = frozen.replace(targets=targets, enabled=jnp.asarray([True, False, True]))
    third = method.open_task(jax.random.key(5), SITES, TABLE, second)
    loss, logged = method.auxiliary_loss(jax.random.key(3), withdrawn, third, pools, 2)
    expected = frozen.replace(
        targets=targets.at[1].set(jnp.asarray([0.5, 0.0, 0.5])), enabled=jnp.asarray([True, False, True])
    )
    again, _ = method.auxiliary_loss(jax.random.key(3), expected, third, pools, 2)
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    assert np.isfinite(loss) and loss > 0
    np.testing.assert_allclose(logged["reflection_loss"] * 2.0, loss, rtol=1e-6)
