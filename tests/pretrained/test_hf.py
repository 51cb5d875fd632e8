"""Hugging Face folders: every file format, both directions, every error, and loading into shardings."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sapt_jax.pretrained import hf, llama_weights, rules
from sapt_jax.pretrained.loading import load_pretrained, model_table, read_model_config
from tests.helpers.hf_files import (
    CONFIG,
    FF,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    abstract,
    assert_is_ours,
    hf_tensors,
    write_hf,
)
from tests.helpers.paths import REPOSITORY


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_format_loads_bit_for_bit_and_writes_back(tmp_path, form, shards, dtype):
    tensors = hf_tensors(0, dtype=dtype)
    write_hf(tmp_path, tensors, form, shards)
    params = load_pretrained(tmp_path, abstract(dtype=dtype))
    assert_is_ours(params, tensors)
    back = rules.to_foreign(params, model_table(tmp_path))
    assert set(back) == set(tensors)
    for name, array in back.items():
        assert array.dtype == dtype and array.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(array.view(np.uint8), tensors[name].view(np.uint8))


def test_values_are_cast_to_the_wanted_dtype(tmp_path):
    tensors = hf_tensors(1)
    params = load_pretrained(write_hf(tmp_path, tensors), abstract(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_is_ours(params, {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()})


@pytest.mark.slow
def test_real_transformers_checkpoint_is_covered(tmp_path):
    """The names and the tied head are transformers' own, as its save_pretrained writes them."""
    torch = pytest.importorskip("torch", reason="the reference model needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="the reference model is transformers' own")
    torch.manual_seed(0)
    for tied in (False, True):
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tie_word_embeddings=tied,
        )
        folder = tmp_path / str(tied)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(folder)
        tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        assert_is_ours(load_pretrained(folder, abstract(tied)), tensors, tied)


def test_tied_copies_and_buffers_are_ignored_only_where_the_config_says_tied(tmp_path):
    tensors = hf_tensors(2, tied=True)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    write_hf(tmp_path, tensors | extra, config=CONFIG | {"tie_word_embeddings": True})
    assert_is_ours(load_pretrained(tmp_path, abstract(tied=True)), tensors, tied=True)
    write_hf(tmp_path, tensors | extra, config=CONFIG)
    with pytest.raises(ValueError, match=r"1 unused[\s\S]*unused: lm_head\.weight"):
        load_pretrained(tmp_path, abstract(tied=True))


def test_all_mismatches_are_listed_in_one_error(tmp_path):
    tensors = hf_tensors(3)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(HEADS * HEAD_DIM, np.float32)
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(WIDTH, np.float32)
    tensors["lm_head.weight"] = np.zeros((VOCAB + 1, WIDTH), np.float32)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((WIDTH, KV_HEADS * HEAD_DIM), np.float32)
    write_hf(tmp_path, tensors, shards=2)
    target = abstract()
    target["decoder"]["adapter"] = {"kernel": jax.ShapeDtypeStruct((2, 5), jnp.float32)}
    with pytest.raises(ValueError) as caught:
        load_pretrained(tmp_path, target)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "3 missing, 2 unused, 2 of the wrong shape" in message
    for line in (
        "missing: model.norm.weight (8,) for decoder/decoder_norm/scale",
        "missing: model.layers.1.mlp.up_proj.weight (10, 8) for decoder/layers/mlp/wi_1/kernel",
        "missing: decoder/adapter/kernel (2, 5): this format has no tensor for it",
        "unused: model.layers.0.self_attn.q_proj.bias (24,)",
        "unused: model.layers.3.input_layernorm.weight (8,)",
        "of the wrong shape: lm_head.weight is (14, 8), the model needs (13, 8)",
        "of the wrong shape: model.layers.2.self_attn.k_proj.weight is (8, 12), the model needs (12, 8)",
    ):
        assert line in message


@pytest.mark.slow
def test_weights_go_straight_into_their_shardings_and_each_shard_reads_only_its_part():
    """Loading needs several devices, so it runs on the 4 virtual ones of a fresh interpreter."""
    command = [sys.executable, "-m", "tests.helpers.on_four_devices"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]


def test_safetensors_reads_parts_and_permuted_rows(tmp_path):
    array = np.random.default_rng(5).standard_normal((6, 7)).astype(np.float32)
    save_file({"x": array}, tmp_path / "x.safetensors")
    source = hf.SafetensorsSource("x", [tmp_path / "x.safetensors"])
    rows = np.array([4, 0, 5])
    np.testing.assert_array_equal(source.read("x", (slice(1, 4), slice(2, 7))), array[1:4, 2:7])
    np.testing.assert_array_equal(source.read("x", (rows, slice(3, 5))), array[rows, 3:5])


@pytest.mark.parametrize("axes", [None, (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_rule_and_its_inverse(axes, permuted, stacked):
    rng = np.random.default_rng(6)
    foreign = rng.standard_normal((4, 3, 5)).astype(np.float32)
    order = rng.permutation(4) if permuted else None
    rule = rules.Rule("w", "w.{layer}" if stacked else "w", axes, order)
    ours = foreign if order is None else foreign[order]
    ours = ours if axes is None else ours.transpose(axes)
    names = {"w.0": foreign, "w.1": -foreign} if stacked else {"w": foreign}
    expected = np.stack([ours, -ours]) if stacked else ours
    leaf = jax.ShapeDtypeStruct(expected.shape, jnp.float32)
    table = rules.Table((rule,))
    params = rules.load(rules.ArraySource("memory", names), table, {"w": leaf})
    np.testing.assert_array_equal(params["w"], expected)
    back = rules.to_foreign(params, table)
    assert set(back) == set(names)
    for name, array in names.items():
        np.testing.assert_array_equal(back[name], array)


def test_writing_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no tensor for: adapter/kernel"):
        rules.to_foreign({"adapter": {"kernel": np.zeros(2)}}, llama_weights.hf_table(CONFIG))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_folder does not exist"):
        load_pretrained(tmp_path / "no_such_folder", abstract())
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_pretrained(tmp_path, abstract())
    write_hf(tmp_path, hf_tensors(7), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists: model-00002-of-00003\.safetensors"):
        load_pretrained(tmp_path, abstract())


def test_broken_files_are_named(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON .*line 2"):
        read_model_config(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match="list, an object is needed"):
        read_model_config(tmp_path)
    config.write_text("{}")
    with pytest.raises(ValueError, match="no field model_type"):
        read_model_config(tmp_path)
    config.write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match="no field model_type"):
        read_model_config(tmp_path)
    config.write_text(json.dumps({"model_type": "mamba"}))
    (tmp_path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        load_pretrained(tmp_path, abstract())
    write_hf(tmp_path, hf_tensors(8), config={"model_type": "mamba"})
    with pytest.raises(ValueError, match="model_type 'mamba' cannot be read; known are: .*llama"):
        load_pretrained(tmp_path, abstract())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        load_pretrained(tmp_path, abstract())
    with pytest.raises(ValueError, match="neither a Hugging Face model folder"):
        load_pretrained(config, abstract())


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    tensors = hf_tensors(9)
    write_hf(tmp_path, tensors, shards=2)
    save_file(tensors, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="another shard holds too"):
        load_pretrained(tmp_path, abstract())


def test_pickled_code_in_a_bin_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .bin weights needs PyTorch")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as plain torch weights"):
        load_pretrained(tmp_path, abstract())


def test_old_torch_files_are_read(tmp_path):
    torch = pytest.importorskip("torch", reason="writing .bin weights needs PyTorch")
    tensors = hf_tensors(10)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    content = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_is_ours(load_pretrained(tmp_path, abstract()), tensors)


def test_a_bin_without_torch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        load_pretrained(tmp_path, abstract())
