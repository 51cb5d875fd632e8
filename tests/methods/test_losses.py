import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods import losses


@pytest.mark.slow
def test_cross_entropy_counts_masked_tokens_only():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(3, 5, 11)), rng.integers(0, 11, (3, 5))
    mask = rng.random((3, 5)) < 0.6
    total, count = losses.token_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(target), jnp.asarray(mask))
    expected = sum(
        np.log(np.exp(logits[b, i]).sum()) - logits[b, i, target[b, i]]
        for b in range(3)
        for i in range(5)
        if mask[b, i]
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == mask.sum()
