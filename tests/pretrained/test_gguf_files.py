"""GGUF files that the tests write: every tensor type, the order of q and k, every error."""

import math

import flax.linen as nn
import flax.traverse_util
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import llama_config_from_hf
from sapt_jax.pretrained import rules
from sapt_jax.pretrained.gguf_files import GGUFSource
from sapt_jax.pretrained.llama_weights import gguf_table, interleaved_order
from sapt_jax.pretrained.loading import load_pretrained, model_table, read_model_config
from tests.helpers.gguf_files import (
    FF,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    METADATA,
    VOCAB,
    WIDTH,
    as_stored,
    permute,
    weights,
    write_gguf,
)


def abstract(tied=True, dtype=jnp.float32):
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    layers = {
        "pre_self_attention_layer_norm": {"scale": leaf(LAYERS, WIDTH)},
        "self_attention": {
            "query": {"kernel": leaf(LAYERS, WIDTH, query)},
            "key": {"kernel": leaf(LAYERS, WIDTH, kv)},
            "value": {"kernel": leaf(LAYERS, WIDTH, kv)},
            "out": {"kernel": leaf(LAYERS, query, WIDTH)},
        },
        "pre_mlp_layer_norm": {"scale": leaf(LAYERS, WIDTH)},
        "mlp": {
            "wi_0": {"kernel": leaf(LAYERS, WIDTH, FF)},
            "wi_1": {"kernel": leaf(LAYERS, WIDTH, FF)},
            "wo": {"kernel": leaf(LAYERS, FF, WIDTH)},
        },
    }
    decoder = {"layers": layers, "decoder_norm": {"scale": leaf(WIDTH)}}
    if not tied:
        decoder["logits_dense"] = {"kernel": leaf(WIDTH, VOCAB)}
    return {"token_embedder": {"embedding": leaf(VOCAB, WIDTH)}, "decoder": decoder}


def assert_is_ours(params, tensors, tied=True):
    """Compares each parameter with the rotate-half weights, stacked and transposed by hand."""
    layers = params["decoder"]["layers"]
    matrices = {
        "attn_q": layers["self_attention"]["query"],
        "attn_k": layers["self_attention"]["key"],
        "attn_v": layers["self_attention"]["value"],
        "attn_output": layers["self_attention"]["out"],
        "ffn_gate": layers["mlp"]["wi_0"],
        "ffn_up": layers["mlp"]["wi_1"],
        "ffn_down": layers["mlp"]["wo"],
    }
    for name, ours in matrices.items():
        expected = np.stack([tensors[f"blk.{layer}.{name}.weight"].T for layer in range(LAYERS)])
        np.testing.assert_array_equal(ours["kernel"], expected, err_msg=name)
    norms = {"attn_norm": "pre_self_attention_layer_norm", "ffn_norm": "pre_mlp_layer_norm"}
    for name, ours in norms.items():
        expected = np.stack([tensors[f"blk.{layer}.{name}.weight"] for layer in range(LAYERS)])
        np.testing.assert_array_equal(layers[ours]["scale"], expected)
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(params["decoder"]["decoder_norm"]["scale"], tensors["output_norm.weight"])
    if not tied:
        np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], tensors["output.weight"].T)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_loads_bit_for_bit_and_writes_back(tmp_path, tied):
    tensors = weights(0, tied)
    file = write_gguf(tmp_path / "m.gguf", METADATA, as_stored(tensors))
    params = load_pretrained(file, abstract(tied))
    assert_is_ours(params, tensors, tied)
    back = rules.to_foreign(params, model_table(file))
    assert set(back) == set(tensors)
    for name, array in as_stored(tensors).items():
        np.testing.assert_array_equal(back[name], array)


def quantised(array, kind):
    """The bytes of a 2-D array in a type that the package can write."""
    return gguf.quants.quantize(array, kind)


def random_blocks(shape, kind, seed):
    """Random bytes for a type that the package can only read; the scales are kept finite."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (math.prod(shape) // block, size), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.1, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind in (Kind.Q4_K, Kind.Q5_K):
        blocks[:, :4] = scale
    elif kind in (Kind.Q6_K, Kind.Q3_K):
        blocks[:, -2:] = scale[:, :2]
    else:
        blocks[:, -4:] = scale
    return blocks.reshape(*shape[:-1], -1)


# The largest error of a value, in steps of its block: half a step where both ends are on the grid. Q4_0 and
# Q5_0 cannot reach the end opposite to the largest value, and lose up to a step there.
STEPS = {
    Kind.Q8_0: (127, 0.51),
    Kind.Q4_0: (8, 1.01),
    Kind.Q4_1: (7.5, 0.51),
    Kind.Q5_0: (16, 1.01),
    Kind.Q5_1: (15.5, 0.51),
}


@pytest.mark.parametrize("kind", STEPS)
def test_quantised_tensors_come_back_within_a_step(tmp_path, kind):
    tensors = weights(1)
    levels, tolerance = STEPS[kind]
    stored = {
        name: (quantised(array, kind), kind) if array.ndim == 2 else array for name, array in as_stored(tensors).items()
    }
    params = load_pretrained(write_gguf(tmp_path / "m.gguf", METADATA, stored), abstract())
    got = {
        "blk.1.attn_q.weight": params["decoder"]["layers"]["self_attention"]["query"]["kernel"][1].T,
        "blk.0.attn_k.weight": params["decoder"]["layers"]["self_attention"]["key"]["kernel"][0].T,
        "blk.1.ffn_down.weight": params["decoder"]["layers"]["mlp"]["wo"]["kernel"][1].T,
        "token_embd.weight": params["token_embedder"]["embedding"],
    }
    for name, array in got.items():
        blocks = tensors[name].reshape(-1, 32)
        step = np.abs(blocks).max(axis=1) / levels
        error = np.abs(np.asarray(array).reshape(-1, 32) - blocks).max(axis=1)
        # The step is rounded to float16, which moves the ends of the grid by 2^-11 of the largest value.
        assert np.all(error <= tolerance * step + np.abs(blocks).max(axis=1) * 2**-10), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_half_precision_is_exact(tmp_path, kind):
    dtype = np.float16 if kind == Kind.F16 else jnp.bfloat16
    tensors = {name: array.astype(dtype).astype(np.float32) for name, array in weights(2).items()}
    stored = {name: (quantised(array, kind), kind) for name, array in as_stored(tensors).items()}
    if kind == Kind.F16:
        stored = {name: array for name, (array, _) in stored.items()}
    file = write_gguf(tmp_path / "m.gguf", METADATA, stored)
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors} == {kind}
    assert_is_ours(load_pretrained(file, abstract()), tensors)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_dequantised_as_the_package_does(tmp_path, kind):
    tensors = weights(3)
    q = random_blocks((HEADS * HEAD_DIM, WIDTH), kind, 0)
    up = random_blocks((FF, WIDTH), kind, 1)
    stored = as_stored(tensors) | {"blk.0.attn_q.weight": (q, kind), "blk.1.ffn_up.weight": (up, kind)}
    tensors["blk.0.attn_q.weight"] = gguf.quants.dequantize(q, kind)[interleaved_order(HEADS, HEAD_DIM)]
    tensors["blk.1.ffn_up.weight"] = gguf.quants.dequantize(up, kind)
    assert np.all(np.isfinite(tensors["blk.0.attn_q.weight"]))
    assert_is_ours(load_pretrained(write_gguf(tmp_path / "m.gguf", METADATA, stored), abstract()), tensors)


@pytest.mark.parametrize("heads,head_dim", [(1, 2), (3, 8), (9, 64)])
def test_the_order_of_q_and_k_undoes_llama_cpp(heads, head_dim):
    rows = np.random.default_rng(4).standard_normal((heads * head_dim, 3))
    np.testing.assert_array_equal(permute(rows, heads)[interleaved_order(heads, head_dim)], rows)


def test_rotating_neighbours_in_the_stored_order_is_rotating_halves_in_ours():
    """The reason for the order: llama.cpp turns rows (2i, 2i + 1) by angle i, we turn rows (i, i + H / 2)."""
    rng = np.random.default_rng(5)
    stored, angles = rng.standard_normal((HEADS, HEAD_DIM)), rng.uniform(0, 6, HEAD_DIM // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    even, odd = stored[:, 0::2], stored[:, 1::2]
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(stored.shape)
    order = interleaved_order(HEADS, HEAD_DIM)
    ours, expected = (
        stored.reshape(-1)[order].reshape(stored.shape),
        turned.reshape(-1)[order].reshape(stored.shape),
    )
    first, second = np.split(ours, 2, axis=1)
    got = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_parts_of_quantised_tensors_equal_the_whole(tmp_path):
    tensors = as_stored(weights(6))
    array = quantised(tensors["blk.0.ffn_up.weight"], Kind.Q4_1)
    file = write_gguf(tmp_path / "m.gguf", METADATA, tensors | {"blk.0.ffn_up.weight": (array, Kind.Q4_1)})
    source = GGUFSource(file)
    whole = gguf.quants.dequantize(array, Kind.Q4_1)
    rows = np.random.default_rng(0).permutation(FF)[:50]
    for index in (
        (slice(3, 9), slice(5, 99)),
        (rows, slice(0, 40)),
        (rows, slice(40, WIDTH)),
        (slice(3, 9), slice(0, 5)),
    ):
        np.testing.assert_array_equal(source.read("blk.0.ffn_up.weight", index), whole[index])


def test_all_mismatches_are_listed_in_one_error(tmp_path):
    tensors = as_stored(weights(11))
    del tensors["blk.1.attn_v.weight"]
    tensors["blk.0.attn_q.bias"] = np.zeros(HEADS * HEAD_DIM, np.float32)
    tensors["output_norm.weight"] = np.zeros(WIDTH - 1, np.float32)
    file = write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    with pytest.raises(ValueError) as caught:
        load_pretrained(file, abstract(tied=False))
    message = str(caught.value)
    assert str(file) in message and "2 missing, 1 unused, 1 of the wrong shape" in message
    for line in (
        "missing: blk.1.attn_v.weight (128, 256) for decoder/layers/self_attention/value/kernel",
        "missing: output.weight (40, 256) for decoder/logits_dense/kernel",
        "unused: blk.0.attn_q.bias (256,)",
        "of the wrong shape: output_norm.weight is (255,), the model needs (256,)",
    ):
        assert line in message


def test_rope_frequencies_are_not_a_weight(tmp_path):
    tensors = as_stored(weights(8)) | {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    assert_is_ours(load_pretrained(write_gguf(tmp_path / "m.gguf", METADATA, tensors), abstract()), weights(8))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
    tensors = as_stored(weights(12))
    tensors["blk.0.ffn_up.weight"] = np.zeros((FF, WIDTH), np.int8)
    file = write_gguf(tmp_path / "m.gguf", METADATA, tensors)
    with pytest.raises(ValueError, match="tensor blk.0.ffn_up.weight is of type I8"):
        load_pretrained(file, abstract())


def test_the_table_covers_the_model_of_its_own_config(tmp_path):
    """Config and table agree: the model built from the metadata has one rule for each parameter."""
    file = write_gguf(tmp_path / "m.gguf", METADATA, as_stored(weights(14, tied=False)))
    config = read_model_config(file)
    model = Llama(llama_config_from_hf(config), jnp.float32, "none")
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, mask, tokens, mask)
    leaves = flax.traverse_util.flatten_dict(nn.unbox(variables)["params"], sep="/")
    rules.check(GGUFSource(file), gguf_table(config), {path: leaf.shape for path, leaf in leaves.items()})
