"""Small LLaMA folders as Hugging Face writes them, and what they hold in our tree."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FF, VOCAB = 3, 8, 4, 2, 6, 10, 13
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}
# All that a run needs to build the model.
LLAMA_CONFIG = CONFIG | {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": FF, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def shapes(tied=False):
    """Our tree's shapes; no two widths agree, so that a forgotten transposition shows."""
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tree = {
        "token_embedder/embedding": (VOCAB, WIDTH),
        "decoder/layers/pre_self_attention_layer_norm/scale": (LAYERS, WIDTH),
        "decoder/layers/self_attention/query/kernel": (LAYERS, WIDTH, query),
        "decoder/layers/self_attention/key/kernel": (LAYERS, WIDTH, kv),
        "decoder/layers/self_attention/value/kernel": (LAYERS, WIDTH, kv),
        "decoder/layers/self_attention/out/kernel": (LAYERS, query, WIDTH),
        "decoder/layers/pre_mlp_layer_norm/scale": (LAYERS, WIDTH),
        "decoder/layers/mlp/wi_0/kernel": (LAYERS, WIDTH, FF),
        "decoder/layers/mlp/wi_1/kernel": (LAYERS, WIDTH, FF),
        "decoder/layers/mlp/wo/kernel": (LAYERS, FF, WIDTH),
        "decoder/decoder_norm/scale": (WIDTH,),
    }
    return tree if tied else tree | {"decoder/logits_dense/kernel": (WIDTH, VOCAB)}


def abstract(tied=False, dtype=jnp.float32):
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes(tied).items()}
    return unflatten_dict(leaves, sep="/")


def hf_tensors(seed, tied=False, dtype=np.float32):
    """Random tensors under transformers' names, written out from its model definition."""
    rng = np.random.default_rng(seed)
    sizes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        sizes["lm_head.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.input_layernorm.weight": (WIDTH,),
            f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"{prefix}.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            f"{prefix}.post_attention_layernorm.weight": (WIDTH,),
            f"{prefix}.mlp.gate_proj.weight": (FF, WIDTH),
            f"{prefix}.mlp.up_proj.weight": (FF, WIDTH),
            f"{prefix}.mlp.down_proj.weight": (WIDTH, FF),
        }
    return {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}


def write_hf(folder, tensors, form="safetensors", shards=1, config=CONFIG):
    """Writes a model folder, in one file or in shards with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" for i in range(shards)] if shards > 1 else [stem + suffix]
    for file, part in zip(files, parts, strict=True):
        content = {name: tensors[name] for name in part}
        if form == "safetensors":
            save_file(content, folder / file)
        else:
            save_torch(content, folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_torch(arrays, file):
    torch = pytest.importorskip("torch", reason="writing .bin weights needs PyTorch")

    def tensor(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({name: tensor(array) for name, array in arrays.items()}, file)


def assert_is_ours(params, tensors, tied=False):
    """Compares each parameter with a stack of transposed tensors, written out by hand."""
    attention = params["decoder"]["layers"]["self_attention"]
    mlp = params["decoder"]["layers"]["mlp"]
    prefix = "model.layers.{}."

    def stack(name, transpose):
        layers = [tensors[prefix.format(layer) + name + ".weight"] for layer in range(LAYERS)]
        return np.stack([layer.T if transpose else layer for layer in layers])

    norms = params["decoder"]["layers"]
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["decoder"]["decoder_norm"]["scale"], tensors["model.norm.weight"])
    np.testing.assert_array_equal(norms["pre_self_attention_layer_norm"]["scale"], stack("input_layernorm", False))
    np.testing.assert_array_equal(norms["pre_mlp_layer_norm"]["scale"], stack("post_attention_layernorm", False))
    for ours, theirs in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}.items():
        np.testing.assert_array_equal(attention[ours]["kernel"], stack(f"self_attn.{theirs}", True))
    for ours, theirs in {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}.items():
        np.testing.assert_array_equal(mlp[ours]["kernel"], stack(f"mlp.{theirs}", True))
    if not tied:
        np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], tensors["lm_head.weight"].T)
