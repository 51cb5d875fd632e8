"""Every kernel that runs here against a written-out loop; the splash kernel runs interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.models.families import make_model
from sapt_jax.models.kernels import causal_attention
from sapt_jax.models.shapes import LLAMA_VARIANTS, T5_VARIANTS

SCALE = 0.3


def inputs(rows=2, length=150, heads=4, kv_heads=2, head_dim=16, seed=0):
    """Random query, key, value, and a mask with padding on the left, after a prompt, and on the right."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((rows, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]
    valid = np.ones((rows, length), bool)
    valid[0, :40] = False
    valid[1, 5:90] = False
    valid[1, -7:] = False
    return *arrays, valid


def loop(query, key, value, valid):
    """In float64, one token at a time; zero at padding."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, i in zip(*np.nonzero(valid), strict=True):
        seen = np.flatnonzero(valid[b, : i + 1])
        for n in range(query.shape[2]):
            scores = SCALE * key[b, seen, n // group].astype(np.float64) @ query[b, i, n]
            shares = np.exp(scores - scores.max())
            out[b, i, n] = shares / shares.sum() @ value[b, seen, n // group]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("length", [128, 150])
def test_attends_to_valid_tokens_up_to_itself(kernel, length):
    query, key, value, valid = inputs(length=length)
    out = np.asarray(causal_attention(query, key, value, jnp.asarray(valid), SCALE, kernel))
    assert out.shape == query.shape and np.isfinite(out).all()
    np.testing.assert_allclose(out * valid[:, :, None, None], loop(query, key, value, valid), atol=2e-6)


@pytest.mark.slow
def test_gradients_of_the_kernel_equal_those_of_the_plain_product():
    *arrays, valid = inputs()
    toward = np.random.default_rng(1).standard_normal(arrays[0].shape) * valid[:, :, None, None]

    def loss(kernel, *arrays):
        return jnp.sum(causal_attention(*arrays, jnp.asarray(valid), SCALE, kernel) * toward)

    plain, splash = (
        jax.jit(jax.grad(functools.partial(loss, kernel), argnums=(0, 1, 2)))(*arrays) for kernel in ("xla", "splash")
    )
    for one, other in zip(plain, splash, strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_auto_is_the_plain_product_without_a_tpu():
    query, key, value, valid = inputs(length=16)
    lowered = jax.jit(functools.partial(causal_attention, scale=SCALE, kernel="auto")).lower(query, key, value, valid)
    plain = jax.jit(functools.partial(causal_attention, scale=SCALE, kernel="xla")).lower(query, key, value, valid)
    assert lowered.as_text() == plain.as_text()


def test_a_kernel_of_other_devices_is_refused():
    query, key, value, valid = inputs(length=16)
    with pytest.raises(ValueError, match="config.model.attention='cudnn' is not for CPUs; choose auto"):
        causal_attention(query, key, value, jnp.asarray(valid), SCALE, "cudnn")


def test_kernels_that_are_unknown_or_do_not_go_with_the_model_are_refused():
    shape = T5_VARIANTS["t5-small"]
    with pytest.raises(ValueError, match="config.model.attention='flash' is unknown; choose one of auto, xla, splash"):
        make_model(shape, "float32", "none", "flash")
    with pytest.raises(ValueError, match="config.model.attention='splash' takes none of T5's biases"):
        make_model(shape, "float32", "none", "splash")
    with pytest.raises(ValueError, match="'cudnn' needs config.model.dtype='bfloat16', not 'float32'"):
        make_model(LLAMA_VARIANTS["llama-tiny"], "float32", "none", "cudnn")
