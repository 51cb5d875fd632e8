"""Fingerprints: the same for the same bits, another one for any bit that differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.contents import tokenizer_fingerprint, weights_fingerprint
from sapt_jax.pretrained.tokenizer import load_tokenizer
from sapt_jax.sharding import AXES, make_mesh

MESH = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.bfloat16)},
        "norm": jnp.asarray(rng.normal(size=7), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(3, 4)), jnp.float16),
    }


@pytest.fixture(scope="module")
def one():
    return weights_fingerprint(weights(), MESH)


def test_the_same_weights_have_the_same_fingerprint(one):
    assert one == weights_fingerprint(weights(), MESH) and len(one) == 64


@pytest.mark.parametrize("leaf", ["norm", "head"])
def test_one_bit_of_one_entry_is_noticed(one, leaf):
    changed = weights()
    entries = np.array(changed[leaf])
    entries.view(f"uint{8 * entries.itemsize}").reshape(-1)[-1] ^= 1
    assert weights_fingerprint({**changed, leaf: jnp.asarray(entries)}, MESH) != one


def test_order_shape_and_place_are_noticed(one):
    whole = weights()
    kernel = whole["layers"]["kernel"]
    for other in (
        {**whole, "layers": {"kernel": kernel[::-1]}},
        {**whole, "layers": {"kernel": kernel.swapaxes(0, 2).reshape(2, 5, 3)}},
        {**whole, "layers": {"bias": kernel}},
        {**whole, "norm": whole["norm"].astype(jnp.bfloat16)},
        {**whole, "head": whole["head"].reshape(4, 3)},
    ):
        assert weights_fingerprint(other, MESH) != one


def test_tokenizers():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer("bytes"))
