import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.methods import shared_attention


def embeddings(seed, batch=3, length=6, width=10):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, width)) - 3.0, jnp.float32)


def test_pool_ignores_padding():
    e = embeddings(0)
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    pooled = shared_attention.pool(e, mask, pool_padding=False)
    for row in range(3):
        np.testing.assert_array_equal(pooled[row], np.max(np.array(e[row])[np.array(mask[row])], axis=0))
    elsewhere = shared_attention.pool(jnp.where(mask[..., None], e, 99.0), mask, pool_padding=False)
    np.testing.assert_array_equal(pooled, elsewhere)


def test_pool_of_an_empty_row_is_zero():
    mask = jnp.zeros((3, 6), bool)
    assert not np.any(shared_attention.pool(embeddings(1), mask, pool_padding=False))


def test_pool_padding_takes_the_pad_embedding_of_rows_shorter_than_the_longest():
    e = np.array(embeddings(2))
    pad = np.full(10, -1.0, np.float32)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], bool)
    e[~mask] = pad
    pooled = shared_attention.pool(jnp.asarray(e), jnp.asarray(mask), pool_padding=True)
    np.testing.assert_array_equal(pooled[0], e[0][mask[0]].max(axis=0))
    np.testing.assert_array_equal(pooled[1], np.maximum(e[1][mask[1]].max(axis=0), pad))
    np.testing.assert_array_equal(pooled[2], e[2][mask[2]].max(axis=0))


def test_weights_equal_a_loop_in_float64():
    rng = np.random.default_rng(3)
    width, tasks = 12, 5
    projection = shared_attention.init_query_projection(jax.random.key(0), width, 7, None)
    projection = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in projection.items()}
    pooled, keys = rng.normal(size=(4, width)), rng.normal(size=(tasks, width))
    active = np.array([True, False, True, True, False])
    query = shared_attention.make_query(projection, jnp.asarray(pooled, jnp.float32))
    log_weights = shared_attention.log_weights(query, jnp.asarray(keys, jnp.float32), jnp.asarray(active), 1.5)
    p = {k: np.array(v, np.float64) for k, v in projection.items()}
    for row in range(4):
        hidden = pooled[row] @ p["down"] @ p["up"]
        hidden = hidden / (1 + np.exp(-hidden))
        normed = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * p["scale"] + p["bias"]
        scores = [np.exp(normed @ keys[t] / (1.5 * width**0.5)) if active[t] else 0.0 for t in range(tasks)]
        np.testing.assert_allclose(np.exp(log_weights[row]), np.array(scores) / sum(scores), rtol=2e-5, atol=1e-7)


def test_initialisation_follows_the_released_code():
    width, hidden = 64, 100
    uniform = shared_attention.init_query_projection(jax.random.key(1), width, hidden, None)
    assert 0.9 * width**-0.5 < np.abs(uniform["down"]).max() <= width**-0.5
    assert 0.9 * hidden**-0.5 < np.abs(uniform["up"]).max() <= hidden**-0.5
    normal = shared_attention.init_query_projection(jax.random.key(1), width, hidden, 0.02)
    np.testing.assert_allclose(np.std(normal["down"]), 0.02, rtol=0.05)
    key = shared_attention.init_key(jax.random.key(2), 4096)
    assert -1 <= key.min() < -0.99 and 0.99 < key.max() <= 1
