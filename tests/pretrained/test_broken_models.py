"""Model folders that are wrong: each is refused with one line that names file and field, before it is used."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sapt_jax.models.shapes import llama_config_from_hf, t5_config_from_hf
from sapt_jax.pretrained.hf import open_folder, read_config
from sapt_jax.pretrained.rules import Rule, Table, load

LLAMA = {
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4},
}
T5 = {"model_type": "t5", "vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize("wrong", [0, -1, "64", 10**9, 1.5, True, [64]], ids=str)
@pytest.mark.parametrize("config, read", [(LLAMA, llama_config_from_hf), (T5, t5_config_from_hf)], ids=["llama", "t5"])
def test_sizes_are_whole_numbers_of_a_size_that_models_have(config, read, wrong):
    for name in set(config) - {"model_type"}:
        with pytest.raises(ValueError, match=f"^config.json: {name} must be a whole number from 1 to .*, not "):
            read({**config, name: wrong})


@pytest.mark.parametrize(
    "fields, fault",
    [
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of the rope scaling must be a positive number"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act must be a string"),
        ({"num_key_value_heads": 3}, "4 heads of width 4 with 3 for keys do not go together"),
        ({"hidden_size": 3}, "4 heads of width 0"),
    ],
)
def test_other_fields_have_the_types_that_they_need(fields, fault):
    with pytest.raises(ValueError, match=fault):
        llama_config_from_hf({**LLAMA, **fields})


def weights(folder):
    """What a model of one vector "x" of three numbers reads from a folder."""
    target = {"x": np.zeros(3, np.float32)}
    return np.asarray(load(open_folder(folder), Table((Rule("x", "w", other_names=("v",)),)), target)["x"])


@pytest.mark.parametrize(
    "tensor, fault",
    [
        (torch.tensor([1.0, float("nan"), 2.0]), "tensor w holds NaN or infinite weights"),
        (torch.tensor([1.0, float("inf"), 2.0], dtype=torch.bfloat16), "tensor w holds NaN or infinite weights"),
        (torch.tensor([1, 2, 3], dtype=torch.int8), "tensor w is of type int8"),
        (torch.tensor([1, 2, 3]), "tensor w is of type int64"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_are_no_weights(tmp_path, tensor, fault, name):
    save = save_file if name.endswith("safetensors") else torch.save
    save({"w": tensor}, tmp_path / name)
    with pytest.raises(ValueError, match=fault):
        weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_small_floats_are_read_exactly(tmp_path, dtype, name):
    tensor = torch.randn(3, generator=torch.Generator().manual_seed(0)).to(dtype)
    save = save_file if name.endswith("safetensors") else torch.save
    save({"v": tensor}, tmp_path / name)
    np.testing.assert_array_equal(weights(tmp_path), tensor.float().numpy())


@pytest.mark.parametrize(
    "content, fault",
    [
        ([torch.ones(3)], "pytorch_model.bin holds a list"),
        (3.0, "pytorch_model.bin holds a float"),
        ({"w": 3.0}, "pytorch_model.bin: w is a float"),
        ({"w": torch.ones(3).to_sparse()}, "pytorch_model.bin: w is a torch.sparse_coo tensor"),
        ({"w": {"v": torch.ones(3)}}, "pytorch_model.bin: w is a dict"),
    ],
)
def test_a_bin_file_of_other_things(tmp_path, content, fault):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=fault):
        weights(tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", 5, None, ["a"], "a\\b"])
def test_an_index_names_files_of_its_folder_alone(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match=r"index.json: weight_map of w: .*Give it the plain name"):
        weights(tmp_path)
    save_file({"w": torch.arange(3.0)}, tmp_path / "model.safetensors")
    assert weights(tmp_path).tolist() == [0, 1, 2]  # the one file counts, as in transformers


@pytest.mark.parametrize(
    "text, fault",
    [
        ("[" * 100_000, "config.json is not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json is not valid JSON"),
        ('{"model_type": ["llama"]}', "config.json: model_type must be a string"),
        ('{"architectures": 3}', "config.json has no field model_type"),
        ('{"architectures": [["LlamaForCausalLM"]]}', "config.json has no field model_type"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}', "sets quantization_config"),
    ],
)
def test_a_config_of_another_form(tmp_path, text, fault):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=fault):
        read_config(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_config(tmp_path) == LLAMA
