"""config.json in the forms in which models were published, old ones above all: they give the shapes of the variants."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from sapt_jax.models.families import read_shape
from sapt_jax.models.shapes import LLAMA_VARIANTS, T5_VARIANTS, llama_config_from_hf, t5_config_from_hf

# The fields that every published T5 has; the rest of each generation's is added below.
T5_FIELDS = {
    "d_kv": 64,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "t5",
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
T5_SIZES = {
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    "3b": {"d_model": 1024, "d_ff": 16384, "num_layers": 24, "num_heads": 32, "d_kv": 128},
    "11b": {"d_model": 1024, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "d_kv": 128},
}
NEWER_T5_SIZES = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
# What each line of models after 1.0 adds.
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LINES = {
    "v1_1": {**GATED, "output_past": True},
    "lm-adapt": {**GATED, "output_past": True, "use_cache": True},
    "flan": {
        **GATED,
        "architectures": ["T5ForConditionalGeneration"],
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "n_positions": 512,
        "relative_attention_max_distance": 128,
        "torch_dtype": "float32",
    },
}
ORIGINAL_T5 = {"architectures": ["T5WithLMHeadModel"], "n_positions": 512, "task_specific_params": {}}

# LLaMA 1's first form, and what later generations changed and added.
LLAMA_1 = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "pad_token_id": -1,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_2 = {
    **LLAMA_1,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    **LLAMA_2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1 = {**LLAMA_3, "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": SCALING}
LLAMA_3_2 = {**LLAMA_3_1, "rope_scaling": {**SCALING, "factor": 32.0}, "tie_word_embeddings": True}


def sized(fields, width, inner, layers, heads, **more):
    size = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**fields, **size, **more}


SEVEN, THIRTEEN = (4096, 11008, 32, 32), (5120, 13824, 40, 40)
LLAMAS = {
    "llama-2-7b": sized(LLAMA_2, *SEVEN, num_key_value_heads=32),
    "llama-2-13b": sized(LLAMA_2, *THIRTEEN, num_key_value_heads=40),
    "llama-3-8b": sized(LLAMA_3, 4096, 14336, 32, 32),
    "llama-3.1-8b": sized(LLAMA_3_1, 4096, 14336, 32, 32),
    "llama-3.2-1b": sized(LLAMA_3_2, 2048, 8192, 16, 32, head_dim=64),
    "llama-3.2-3b": sized(LLAMA_3_2, 3072, 8192, 28, 24, head_dim=128),
    "smollm2-135m": sized(
        LLAMA_3, 576, 1536, 30, 9,
        num_key_value_heads=3, rope_theta=100000, tie_word_embeddings=True, vocab_size=49152, is_llama_config=True,
    ),
}  # fmt: skip


def written(folder, config, tensor="shared.weight"):
    """The shape of a folder with this config.json and one tensor, which is all that reading a shape opens."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({tensor: np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return read_shape(str(folder), "")


@pytest.mark.parametrize("size", T5_SIZES)
def test_the_first_t5(size, tmp_path):
    config = {**T5_FIELDS, **ORIGINAL_T5, **T5_SIZES[size]}
    assert written(tmp_path, config) == T5_VARIANTS[f"t5-{size}"]
    del config["model_type"]
    assert written(tmp_path, config) == T5_VARIANTS[f"t5-{size}"]


@pytest.mark.parametrize("size", NEWER_T5_SIZES)
@pytest.mark.parametrize("line", LINES)
def test_the_t5_with_a_gated_mlp(line, size, tmp_path):
    layers = NEWER_T5_SIZES[size]["num_layers"]
    config = {**T5_FIELDS, **LINES[line], **NEWER_T5_SIZES[size], "num_decoder_layers": layers}
    assert t5_config_from_hf(config) == T5_VARIANTS[f"t5-v1_1-{size}"]
    # The weights of all three have a head of their own, which the shape is read off in a folder.
    assert written(tmp_path, config, "lm_head.weight") == T5_VARIANTS[f"t5-v1_1-{size}"]


@pytest.mark.parametrize("size", NEWER_T5_SIZES)
def test_mt5_is_the_newer_t5_with_a_larger_vocabulary(size, tmp_path):
    config = {
        **T5_FIELDS, **NEWER_T5_SIZES[size], "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5",
        "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "vocab_size": 250112,
    }  # fmt: skip
    want = dataclasses.replace(T5_VARIANTS[f"t5-v1_1-{size}"], vocab_size=250112)
    assert written(tmp_path, config, "lm_head.weight") == want
    assert written(tmp_path, {**config, "feed_forward_proj": "gated-gelu"}, "lm_head.weight") == want


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_2_and_after(name, tmp_path):
    assert written(tmp_path, LLAMAS[name]) == LLAMA_VARIANTS[name]


@pytest.mark.parametrize(("newer", "size"), [("llama-2-7b", SEVEN), ("llama-2-13b", THIRTEEN)])
def test_llama_1_is_llama_2_over_half_the_positions(newer, size, tmp_path):
    want = dataclasses.replace(LLAMA_VARIANTS[newer], norm_eps=1e-6, max_positions=2048)
    assert written(tmp_path, sized(LLAMA_1, *size)) == want


def test_a_scaling_of_the_old_form_needs_no_rope_base():
    config = sized(LLAMA_2, *SEVEN, rope_scaling={"type": "linear", "factor": 2.0})
    shape = llama_config_from_hf(config)
    assert shape.rope_theta == 10000.0 and dict(shape.rope_scaling) == {"rope_type": "linear", "factor": 2.0}


NEEDED = {
    "llama": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "t5": ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff"),
}
NEEDED |= {"mt5": NEEDED["t5"], "umt5": NEEDED["t5"]}
WIDE = {"llama": {"hidden_size": 16}}  # a head's width is even


@pytest.mark.parametrize("kind", NEEDED)
@pytest.mark.parametrize("absent", [{}, None], ids=["absent", "null"])
def test_every_default_is_that_of_transformers(kind, absent):
    from transformers import AutoConfig

    config = {"model_type": kind, **dict.fromkeys(NEEDED[kind], 8), **WIDE.get(kind, {})}
    theirs = AutoConfig.for_model(**config)
    if absent is None:
        config = {**dict.fromkeys(theirs.to_dict()), **config}
    if kind == "llama":
        ours = llama_config_from_hf(config)
        assert (ours.activation, ours.norm_eps) == (theirs.hidden_act, theirs.rms_norm_eps)
        assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
        assert (ours.rope_theta, ours.rope_scaling) == (theirs.rope_parameters["rope_theta"], ())
        assert (ours.max_positions, ours.tie_embeddings) == (theirs.max_position_embeddings, theirs.tie_word_embeddings)
        return
    ours = t5_config_from_hf(config)
    assert (ours.activation, ours.gated) == (theirs.dense_act_fn, theirs.is_gated_act)
    assert (ours.norm_eps, ours.num_decoder_layers) == (theirs.layer_norm_epsilon, theirs.num_decoder_layers)
    assert ours.relative_buckets == theirs.relative_attention_num_buckets
    assert ours.relative_max_distance == theirs.relative_attention_max_distance
    assert ours.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"feed_forward_proj": "gated-silu"},
        {"feed_forward_proj": "gelu"},
        {"dense_act_fn": "silu"},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
        {"feed_forward_proj": "relu", "is_gated_act": True},
    ],
)
def test_the_mlp_is_that_of_transformers(fields):
    from transformers import T5Config

    theirs, ours = T5Config(**fields), t5_config_from_hf({**T5_FIELDS, **T5_SIZES["small"], **fields})
    assert (ours.activation, ours.gated) == (theirs.dense_act_fn, theirs.is_gated_act)


@pytest.mark.parametrize("field", ["feed_forward_proj", "dense_act_fn"])
def test_an_unknown_activation_is_named(field):
    with pytest.raises(ValueError, match=f"there: {field} 'swish' is not supported; supported are relu, gelu_new"):
        t5_config_from_hf({**T5_FIELDS, **T5_SIZES["small"], field: "swish"}, "there")
