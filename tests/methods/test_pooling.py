import jax.numpy as jnp
import numpy as np

from sapt_jax.methods.pooling import max_over_tokens, mean_over_tokens


def embeddings(seed, batch=3, length=6, width=10):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, width)) - 3.0, jnp.float32)


def test_pool_ignores_padding():
    e = embeddings(0)
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    pooled = max_over_tokens(e, mask, pool_padding=False)
    for row in range(3):
        np.testing.assert_array_equal(pooled[row], np.max(np.array(e[row])[np.array(mask[row])], axis=0))
    elsewhere = max_over_tokens(jnp.where(mask[..., None], e, 99.0), mask, pool_padding=False)
    np.testing.assert_array_equal(pooled, elsewhere)


def test_pool_of_an_empty_row_is_zero():
    mask = jnp.zeros((3, 6), bool)
    assert not np.any(max_over_tokens(embeddings(1), mask, pool_padding=False))


def test_pool_padding_takes_the_pad_embedding_of_rows_shorter_than_the_longest():
    e = np.array(embeddings(2))
    pad = np.full(10, -1.0, np.float32)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]], bool)
    e[~mask] = pad
    pooled = max_over_tokens(jnp.asarray(e), jnp.asarray(mask), pool_padding=True)
    np.testing.assert_array_equal(pooled[0], e[0][mask[0]].max(axis=0))
    np.testing.assert_array_equal(pooled[1], np.maximum(e[1][mask[1]].max(axis=0), pad))
    np.testing.assert_array_equal(pooled[2], e[2][mask[2]].max(axis=0))


def test_the_mean_is_over_tokens_alone():
    e = embeddings(3)
    mask = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    pooled = mean_over_tokens(e, mask)
    for row in range(2):
        expected = np.array(e[row], np.float64)[np.array(mask[row])].mean(axis=0)
        np.testing.assert_allclose(pooled[row], expected, rtol=1e-5)
    assert not np.any(pooled[2])
