"""T5 from Hugging Face folders: names, tied heads, both directions, every error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from sapt_jax.models.shapes import t5_config_from_hf
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained import rules, t5_weights
from sapt_jax.pretrained.loading import load_pretrained, model_table, read_model_config

VOCAB, WIDTH, ENCODER_LAYERS, DECODER_LAYERS, HEADS, HEAD_DIM, FF, BUCKETS = 13, 10, 2, 3, 3, 4, 7, 8
INNER = HEADS * HEAD_DIM


def make_config(model_type="t5", gated=True, **overrides):
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "num_layers": ENCODER_LAYERS,
        "num_decoder_layers": DECODER_LAYERS,
        "num_heads": HEADS,
        "d_kv": HEAD_DIM,
        "d_ff": FF,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": BUCKETS,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    } | overrides


def make_tensors(seed, gated=True, head=True, bias_per_layer=False):
    """Random tensors under transformers' names, written out from its model definition."""
    sizes = {"shared.weight": (VOCAB, WIDTH)}
    if head:
        sizes["lm_head.weight"] = (VOCAB, WIDTH)
    attentions = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
    for stack, layers in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)):
        sizes[f"{stack}.final_layer_norm.weight"] = (WIDTH,)
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            for place, attention in enumerate(attentions[stack]):
                for letter in "qkv":
                    sizes[f"{block}.{place}.{attention}.{letter}.weight"] = (INNER, WIDTH)
                sizes[f"{block}.{place}.{attention}.o.weight"] = (WIDTH, INNER)
                sizes[f"{block}.{place}.layer_norm.weight"] = (WIDTH,)
            if layer == 0 or bias_per_layer:
                sizes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (BUCKETS, HEADS)
            place = len(attentions[stack])
            for kernel in ("wi_0", "wi_1") if gated else ("wi",):
                sizes[f"{block}.{place}.DenseReluDense.{kernel}.weight"] = (FF, WIDTH)
            sizes[f"{block}.{place}.DenseReluDense.wo.weight"] = (WIDTH, FF)
            sizes[f"{block}.{place}.layer_norm.weight"] = (WIDTH,)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def write(folder, tensors, config):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def abstract_params(path):
    model = T5(t5_config_from_hf(read_model_config(path)), jnp.float32, "none")
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])


def load(path):
    return flatten_dict(load_pretrained(path, abstract_params(path)), sep="/")


@pytest.mark.parametrize("gated", (True, False))
def test_every_parameter_is_a_stack_of_transposed_tensors(tmp_path, gated):
    tensors = make_tensors(seed=1, gated=gated)
    params = load(write(tmp_path, tensors, make_config(gated=gated)))
    assert sum(leaf.size for leaf in params.values()) == sum(tensor.size for tensor in tensors.values())

    def stack(name, layers):
        return np.stack([tensors[name.format(layer)].T for layer in range(layers)])

    want = {
        "token_embedder/embedding": tensors["shared.weight"],
        "decoder/logits_dense/kernel": tensors["lm_head.weight"].T,
        "encoder/encoder_norm/scale": tensors["encoder.final_layer_norm.weight"],
        "decoder/decoder_norm/scale": tensors["decoder.final_layer_norm.weight"],
    }
    relative = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for ours, theirs, layers in (
        ("encoder/layers/attention", "encoder.block.{}.layer.0.SelfAttention", ENCODER_LAYERS),
        ("decoder/layers/self_attention", "decoder.block.{}.layer.0.SelfAttention", DECODER_LAYERS),
        (
            "decoder/layers/encoder_decoder_attention",
            "decoder.block.{}.layer.1.EncDecAttention",
            DECODER_LAYERS,
        ),
    ):
        for kernel, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            want[f"{ours}/{kernel}/kernel"] = stack(f"{theirs}.{letter}.weight", layers)
    for stack_name, place, layers in (("encoder", 1, ENCODER_LAYERS), ("decoder", 2, DECODER_LAYERS)):
        want[f"{stack_name}/relpos_bias/rel_embedding"] = tensors[relative.format(stack_name)].T
        for kernel in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            name = f"{stack_name}.block.{{}}.layer.{place}.DenseReluDense.{kernel}.weight"
            want[f"{stack_name}/layers/mlp/{kernel}/kernel"] = stack(name, layers)
    for ours, theirs, layers in (
        ("encoder/layers/pre_attention_layer_norm", "encoder.block.{}.layer.0", ENCODER_LAYERS),
        ("encoder/layers/pre_mlp_layer_norm", "encoder.block.{}.layer.1", ENCODER_LAYERS),
        ("decoder/layers/pre_self_attention_layer_norm", "decoder.block.{}.layer.0", DECODER_LAYERS),
        ("decoder/layers/pre_cross_attention_layer_norm", "decoder.block.{}.layer.1", DECODER_LAYERS),
        ("decoder/layers/pre_mlp_layer_norm", "decoder.block.{}.layer.2", DECODER_LAYERS),
    ):
        want[f"{ours}/scale"] = stack(f"{theirs}.layer_norm.weight", layers)
    assert params.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_array_equal(params[path], array, err_msg=path)


@pytest.mark.parametrize(("model_type", "gated"), (("t5", True), ("t5", False), ("mt5", True), ("umt5", True)))
def test_back_to_the_same_tensors(tmp_path, model_type, gated):
    tensors = make_tensors(seed=2, gated=gated, bias_per_layer=model_type == "umt5")
    path = write(tmp_path, tensors, make_config(model_type, gated))
    back = rules.to_foreign(load_pretrained(path, abstract_params(path)), model_table(path))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_bias_of_every_layer(tmp_path):
    tensors = make_tensors(seed=3, bias_per_layer=True)
    params = load(write(tmp_path, tensors, make_config("umt5")))
    name = "decoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"
    np.testing.assert_array_equal(params["decoder/relpos_bias/rel_embedding"][2], tensors[name].T)


@pytest.mark.slow
def test_the_weights_say_whether_the_head_is_tied(tmp_path):
    tensors = make_tensors(seed=4)

    def tied(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        stored = {k: v for k, v in (tensors | changes).items() if v is not None}
        write(folder, stored, make_config(tie_word_embeddings=True))
        assert ("decoder/logits_dense/kernel" in load(folder)) != read_model_config(folder)["tie_word_embeddings"]
        return read_model_config(folder)["tie_word_embeddings"]

    assert not tied("own")
    assert tied("none", **{"lm_head.weight": None})
    assert tied("copy", **{"lm_head.weight": tensors["shared.weight"].copy()})


def test_outputs_are_scaled_as_the_config_says(tmp_path):
    for number, (fields, scaled) in enumerate(
        [
            ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
            ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
            ({"tie_word_embeddings": False}, False),
            ({"tie_word_embeddings": True}, True),
            ({"tie_word_embeddings": True, "model_type": "mt5"}, False),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, make_tensors(seed=5, head=False), make_config(**fields))
        config = read_model_config(folder)
        shape = t5_config_from_hf(config)
        assert config["tie_word_embeddings"] and config["scale_decoder_outputs"] is scaled
        assert (shape.tie_embeddings if shape.scale_outputs is None else shape.scale_outputs) is scaled


def test_copies_of_the_embedding_are_passed_over(tmp_path):
    tensors = make_tensors(seed=6, head=False)
    tensors |= {f"{stack}.embed_tokens.weight": tensors["shared.weight"].copy() for stack in ("encoder", "decoder")}
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = np.zeros((BUCKETS, HEADS), np.float32)
    params = load(write(tmp_path, tensors, make_config()))
    np.testing.assert_array_equal(params["token_embedder/embedding"], tensors["shared.weight"])


def test_checkpoint_of_another_size_names_both_sides(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    write(small, make_tensors(seed=7), make_config())
    write(large, make_tensors(seed=8), make_config(d_model=12, num_decoder_layers=4))
    with pytest.raises(ValueError) as error:
        load_pretrained(small, abstract_params(large))
    text = str(error.value)
    assert str(small) in text
    assert "shared.weight is (13, 10), the model needs (13, 12) for token_embedder/embedding" in text
    assert "missing: decoder.block.3.layer.0.SelfAttention.q.weight" in text


def test_the_other_generation_names_what_is_unused_and_missing(tmp_path):
    path = write(tmp_path, make_tensors(seed=9, gated=True), make_config(gated=False))
    with pytest.raises(ValueError) as error:
        load_pretrained(path, abstract_params(path))
    assert "missing: encoder.block.0.layer.1.DenseReluDense.wi.weight" in str(error.value)
    assert "unused: decoder.block.0.layer.2.DenseReluDense.wi_1.weight" in str(error.value)


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no weights"):
        read_model_config(tmp_path)


def test_table_has_one_rule_for_each_parameter():
    for model_type in t5_weights.MODEL_TYPES:
        table = t5_weights.hf_table(make_config(model_type, tie_word_embeddings=False))
        paths = [rule.path for rule in table.rules]
        assert len(paths) == len(set(paths))
