import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.shared_attention import QueryProjection, SharedAttention


def drawn(rng, tree):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


@pytest.mark.slow
def test_weights_equal_a_loop_in_float64():
    rng = np.random.default_rng(3)
    width, tasks, slot = 12, 5, 2
    attention = SharedAttention(query_hidden=7, query_init_std=None, temperature=1.5)
    pooled, keys = rng.normal(size=(4, width)), rng.normal(size=(tasks, width))
    active = np.array([True, False, True, True, False])
    inputs = (jnp.asarray(pooled, jnp.float32), jnp.asarray(keys, jnp.float32), jnp.asarray(active), jnp.asarray(slot))
    params = drawn(
        rng,
        jax.tree.map(
            lambda box: box.value,
            attention.init(jax.random.key(0), *inputs)["params"],
            is_leaf=lambda x: hasattr(x, "names"),
        ),
    )
    log_weights = attention.apply({"params": params}, *inputs)
    p = jax.tree.map(lambda x: np.array(x, np.float64), params["query_projection"])
    keys[slot] = np.array(params["key"], np.float64)
    for row in range(4):
        hidden = pooled[row] @ p["down"]["kernel"] @ p["up"]["kernel"]
        hidden = hidden / (1 + np.exp(-hidden))
        normed = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        scores = [np.exp(normed @ keys[t] / (1.5 * width**0.5)) if active[t] else 0.0 for t in range(tasks)]
        np.testing.assert_allclose(np.exp(log_weights[row]), np.array(scores) / sum(scores), rtol=2e-5, atol=1e-7)


@pytest.mark.slow
def test_initialisation_follows_the_released_code():
    width, hidden = 64, 100

    def params_of(module, *inputs):
        boxed = module.init(jax.random.key(1), *inputs)["params"]
        return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: hasattr(x, "names"))

    uniform = params_of(QueryProjection(hidden, None), jnp.ones((1, width)))
    assert 0.9 * width**-0.5 < np.abs(uniform["down"]["kernel"]).max() <= width**-0.5
    assert 0.9 * hidden**-0.5 < np.abs(uniform["up"]["kernel"]).max() <= hidden**-0.5
    assert (uniform["norm"]["scale"] == 1).all() and (uniform["norm"]["bias"] == 0).all()
    normal = params_of(QueryProjection(hidden, 0.02), jnp.ones((1, width)))
    np.testing.assert_allclose(np.std(normal["down"]["kernel"]), 0.02, rtol=0.05)
    inputs = (jnp.ones((1, 4096)), jnp.ones((2, 4096)), jnp.ones(2, bool), jnp.asarray(0))
    key = params_of(SharedAttention(1, None, 1.0), *inputs)["key"]
    assert -1 <= key.min() < -0.99 and 0.99 < key.max() <= 1


def test_shapes_that_do_not_go_together_are_an_error():
    attention = SharedAttention(4, None, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        attention.init(jax.random.key(0), jnp.ones((3, 8)), jnp.ones((2, 6)), jnp.ones(2, bool), jnp.asarray(0))
