"""GGUF metadata as a config: every field, every kind of rope scaling, every error."""

import math

import numpy as np
import pytest

from sapt_jax.models.shapes import llama_config_from_hf
from sapt_jax.pretrained.loading import read_model_config
from tests.helpers.gguf_files import FF, HEAD_DIM, HEADS, KV_HEADS, LAYERS, METADATA, VOCAB, WIDTH, write_gguf

TIED = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32)}
UNTIED = TIED | {"output.weight": np.zeros((VOCAB, WIDTH), np.float32)}


def test_metadata_becomes_a_config(tmp_path):
    config = read_model_config(write_gguf(tmp_path / "m.gguf", METADATA, TIED))
    assert config["rms_norm_eps"] == pytest.approx(1e-5, rel=1e-6)
    del config["rms_norm_eps"]
    assert config == {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    untied = read_model_config(write_gguf(tmp_path / "untied.gguf", METADATA, UNTIED))
    assert untied["tie_word_embeddings"] is False
    one_per_layer = METADATA | {"llama.attention.head_count": [HEADS] * LAYERS}
    del one_per_layer["llama.attention.head_count_kv"]
    config = read_model_config(write_gguf(tmp_path / "mha.gguf", one_per_layer, TIED))
    assert config["num_attention_heads"] == config["num_key_value_heads"] == HEADS


def llama3_divisors(theta, factor, low, high, original):
    """rope_freqs.weight as llama.cpp's converter writes it."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * theta ** (i / HEAD_DIM)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_a_file_of_llama_1_or_2_has_no_rope_base(tmp_path):
    metadata = {key: value for key, value in METADATA.items() if key != "llama.rope.freq_base"}
    config = llama_config_from_hf(read_model_config(write_gguf(tmp_path / "m.gguf", metadata, TIED)))
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_become_rope_scaling(tmp_path, factor):
    metadata = METADATA | {"llama.rope.freq_base": 500000.0}
    frequencies = {"rope_freqs.weight": llama3_divisors(500000.0, factor, 1.0, 4.0, 8192)}
    scaling = read_model_config(write_gguf(tmp_path / "m.gguf", metadata, TIED | frequencies))["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    odd = {"rope_freqs.weight": llama3_divisors(500000.0, factor, 1.0, 2.0, 8192)}
    with pytest.raises(ValueError, match="rope_freqs.weight is not Llama 3's"):
        read_model_config(write_gguf(tmp_path / "odd.gguf", metadata, TIED | odd))
    ones = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    assert read_model_config(write_gguf(tmp_path / "ones.gguf", metadata, TIED | ones))["rope_scaling"] is None
    both = metadata | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(ValueError, match="both rope_freqs.weight and"):
        read_model_config(write_gguf(tmp_path / "both.gguf", both, TIED | frequencies))


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "type": "yarn",
                "factor": 2.0,
                "original_context_length": 64,
                "finetuned": True,
                "yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling_is_read(tmp_path, fields, expected):
    metadata = METADATA | {f"llama.rope.scaling.{key}": value for key, value in fields.items()}
    config = read_model_config(write_gguf(tmp_path / "m.gguf", metadata, TIED))
    assert config["rope_scaling"] == expected
    assert dict(llama_config_from_hf(config).rope_scaling) == (expected or {})


def test_old_linear_scaling_is_read(tmp_path):
    metadata = METADATA | {"llama.rope.scale_linear": 2.0}
    config = read_model_config(write_gguf(tmp_path / "m.gguf", metadata, TIED))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "change,match",
    [
        ({"llama.rope.scaling.type": "longrope"}, "only 'linear' and 'yarn' can be read"),
        ({"llama.rope.scaling.type": "linear"}, "is missing factor"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.odd": 1.0,
            },
            "also sets odd",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        (
            {"llama.rope.dimension_count": 32},
            "llama.rope.dimension_count = 32 differs from the head width 64",
        ),
        ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv differs between layers"),
        ({"llama.block_count": None}, "no metadata field llama.block_count"),
        ({"llama.block_count": None}, "no metadata field llama.block_count"),
    ],
)
def test_what_the_model_cannot_do_is_an_error_that_names_the_field(tmp_path, change, match):
    metadata = {key: value for key, value in (METADATA | change).items() if value is not None}
    file = write_gguf(tmp_path / "m.gguf", metadata, TIED)
    with pytest.raises(ValueError, match=match) as caught:
        read_model_config(file)
    assert str(file) in str(caught.value)


def test_other_architectures_and_broken_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        read_model_config(write_gguf(tmp_path / "q.gguf", {}, UNTIED, arch="qwen2"))
    with pytest.raises(ValueError, match="no tensor token_embd.weight"):
        read_model_config(write_gguf(tmp_path / "e.gguf", METADATA, {"x": np.zeros(3, np.float32)}))
    (tmp_path / "b.gguf").write_bytes(b"GGUFnot")
    with pytest.raises(ValueError, match=r"b\.gguf is not a readable GGUF file"):
        read_model_config(tmp_path / "b.gguf")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf does not exist"):
        read_model_config(tmp_path / "absent.gguf")


def test_a_rewritten_file_is_read_anew(tmp_path):
    first = read_model_config(write_gguf(tmp_path / "m.gguf", METADATA, TIED))
    second = read_model_config(write_gguf(tmp_path / "m.gguf", METADATA | {"llama.context_length": 64}, TIED))
    assert (first["max_position_embeddings"], second["max_position_embeddings"]) == (128, 64)
