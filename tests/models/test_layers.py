"""The layers that both models share: products in mixed precision, their gradients, and the mixture of LoRA blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import pet
from sapt_jax.models.layers import Dense, RMSNorm, lora_delta, matmul

BATCH, LENGTH, WIDTH, FEATURES, TASKS, RANK, ALPHA = 3, 5, 7, 6, 4, 2, 5.0


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def make_site(seed):
    """(x, kernel, a [D, T, R], b [T, R, F], weights [B, T]) in float64."""
    x, kernel = draw(seed, BATCH, LENGTH, WIDTH), draw(seed + 1, WIDTH, FEATURES)
    a, b = draw(seed + 2, WIDTH, TASKS, RANK), draw(seed + 3, TASKS, RANK, FEATURES)
    weights = np.random.default_rng(seed + 4).dirichlet(np.ones(TASKS), BATCH)
    return x, kernel, a, b, weights


def mixture_of(a, b, weights, slot=None):
    bank = {"a": jnp.asarray(a[None], jnp.float32), "b": jnp.asarray(b[None], jnp.float32)}
    mixture = pet.Lora(RANK, ALPHA, slot is not None).mix(bank, jnp.asarray(weights, jnp.float32), slot)
    return {name: leaf[0] for name, leaf in mixture.blocks.items()}, mixture


def written_out(x, kernel, a, b, weights):
    """W x + sum over blocks of weight * alpha / R * (x A_t) B_t, one block and one row after the other."""
    y = np.stack([row @ kernel for row in x])
    for row in range(BATCH):
        for task in range(TASKS):
            y[row] += weights[row, task] * (ALPHA / RANK) * (x[row] @ a[:, task]) @ b[task]
    return y


def test_mixture_equals_the_written_out_sum_of_blocks():
    x, kernel, a, b, weights = make_site(seed=0)
    blocks, mixture = mixture_of(a, b, weights)
    dense = Dense(FEATURES, ("embed", "heads"), jnp.float32)
    got = dense.apply({"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, x.astype(np.float32), blocks, mixture)
    np.testing.assert_allclose(got, written_out(x, kernel, a, b, weights), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_mixture_gradients_equal_finite_differences():
    x, kernel, a, b, weights = make_site(seed=10)
    direction = draw(20, BATCH, LENGTH, FEATURES)

    def loss(x, a, b, weights):
        blocks, mixture = mixture_of(a, b, weights)
        return jnp.sum(lora_delta(x, blocks, mixture, jnp.float32) * direction)

    def reference(x, a, b, weights):
        return np.sum(written_out(x, 0 * kernel, a, b, weights) * direction)

    arguments = [x, a, b, weights]
    as_float32 = [jnp.asarray(argument, jnp.float32) for argument in arguments]
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*as_float32)
    for place, gradient in enumerate(gradients):
        step = draw(30 + place, *arguments[place].shape)
        moved = [arguments[:place] + [arguments[place] + sign * step] + arguments[place + 1 :] for sign in (0.5, -0.5)]
        # The reference is linear in each argument, so a central difference is exact.
        want = reference(*moved[0]) - reference(*moved[1])
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * step), want, rtol=1e-4, atol=1e-4)


def test_slot_columns_let_the_slot_alone_pass_gradients_down():
    x, _, a, b, weights = make_site(seed=40)
    slot = 2
    blocks, mixture = mixture_of(a, b, weights, jnp.int32(slot))

    def loss(x):
        return jnp.sum(jnp.sin(lora_delta(x, blocks, mixture, jnp.float32)))

    x = jnp.asarray(x, jnp.float32)
    cotangent = jnp.cos(lora_delta(x, blocks, mixture, jnp.float32))
    scale = weights[:, slot, None, None] * ALPHA / RANK
    want = scale * np.einsum("blf,rf,dr->bld", cotangent, b[slot], a[:, slot])
    np.testing.assert_allclose(jax.grad(loss)(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradients_accumulate_in_float32(dtype):
    """Against the exact product of the rounded operands: nothing is rounded between them and the float32 sum."""
    x, kernel, cotangent = draw(50, 2, 3, 300), draw(51, 300, 4), draw(52, 2, 3, 4)
    rounded = [np.asarray(jnp.asarray(array, dtype), np.float64) for array in (x, kernel, cotangent)]
    inputs = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    out, pullback = jax.vjp(lambda x, kernel: matmul(x, kernel, dtype, jnp.float32), *inputs)
    dx, dkernel = pullback(jnp.asarray(cotangent, jnp.float32))
    assert out.dtype == dx.dtype == dkernel.dtype == jnp.float32
    np.testing.assert_allclose(out, np.einsum("bld,df->blf", rounded[0], rounded[1]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, np.einsum("blf,df->bld", rounded[2], rounded[1]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel, np.einsum("bld,blf->df", rounded[0], rounded[2]), rtol=1e-4, atol=1e-4)


def test_frozen_bfloat16_kernel_keeps_its_dtype_in_the_gradient():
    x, kernel = jnp.asarray(draw(60, 2, 3), jnp.bfloat16), jnp.asarray(draw(61, 3, 4), jnp.bfloat16)
    gradients = jax.grad(lambda *args: matmul(*args, jnp.bfloat16, jnp.float32).sum(), argnums=(0, 1))(x, kernel)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_norm_is_computed_in_float32_whatever_its_input():
    x, scale = 1e4 * draw(70, 3, 4, 64), 1 + draw(71, 64)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    got = RMSNorm(1e-6, jnp.float32).apply(
        {"params": {"scale": jnp.asarray(scale, jnp.float32)}}, jnp.asarray(x, jnp.bfloat16)
    )
    want = rounded / np.sqrt(np.mean(rounded**2, axis=-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
