"""Rule tables of the LLaMA family: Hugging Face's names and llama.cpp's."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sapt_jax.pretrained.rules import Rule, Table

MODEL_TYPES = ("llama",)

_TRANSPOSE = (1, 0)
_LAYERS = "decoder/layers"


def hf_table(config: Mapping[str, Any]) -> Table:
    """Returns the table for transformers' LlamaForCausalLM.

    Args:
      config: the contents of config.json; `tie_word_embeddings` (False where absent, as in transformers) says
        whether a stored `lm_head.weight` is a mere copy of the embedding.
    """
    attention, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    ignore = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"]
    tied = ("lm_head.weight",) if config.get("tie_word_embeddings", False) else ()
    ignore += map(re.escape, tied)
    rules = (
        Rule("token_embedder/embedding", "model.embed_tokens.weight", other_names=tied),
        Rule(f"{_LAYERS}/pre_self_attention_layer_norm/scale", "model.layers.{layer}.input_layernorm.weight"),
        Rule(f"{_LAYERS}/self_attention/query/kernel", f"{attention}.q_proj.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/self_attention/key/kernel", f"{attention}.k_proj.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/self_attention/value/kernel", f"{attention}.v_proj.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/self_attention/out/kernel", f"{attention}.o_proj.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/pre_mlp_layer_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight"),
        Rule(f"{_LAYERS}/mlp/wi_0/kernel", f"{mlp}.gate_proj.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/mlp/wi_1/kernel", f"{mlp}.up_proj.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/mlp/wo/kernel", f"{mlp}.down_proj.weight", _TRANSPOSE),
        Rule("decoder/decoder_norm/scale", "model.norm.weight"),
        Rule("decoder/logits_dense/kernel", "lm_head.weight", _TRANSPOSE),
    )
    return Table(rules, tuple(ignore))


def gguf_table(config: Mapping[str, Any]) -> Table:
    """Returns the table for llama.cpp's `llama` architecture.

    Args:
      config: as `gguf.read_config` returns it; the head counts and `head_dim` give the order of the rows of q
        and k.
    """
    block, head_dim = "blk.{layer}", config["head_dim"]
    query, key = (
        interleaved_order(config[heads], head_dim) for heads in ("num_attention_heads", "num_key_value_heads")
    )
    rules = (
        Rule("token_embedder/embedding", "token_embd.weight"),
        Rule(f"{_LAYERS}/pre_self_attention_layer_norm/scale", f"{block}.attn_norm.weight"),
        Rule(f"{_LAYERS}/self_attention/query/kernel", f"{block}.attn_q.weight", _TRANSPOSE, query),
        Rule(f"{_LAYERS}/self_attention/key/kernel", f"{block}.attn_k.weight", _TRANSPOSE, key),
        Rule(f"{_LAYERS}/self_attention/value/kernel", f"{block}.attn_v.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/self_attention/out/kernel", f"{block}.attn_output.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/pre_mlp_layer_norm/scale", f"{block}.ffn_norm.weight"),
        Rule(f"{_LAYERS}/mlp/wi_0/kernel", f"{block}.ffn_gate.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/mlp/wi_1/kernel", f"{block}.ffn_up.weight", _TRANSPOSE),
        Rule(f"{_LAYERS}/mlp/wo/kernel", f"{block}.ffn_down.weight", _TRANSPOSE),
        Rule("decoder/decoder_norm/scale", "output_norm.weight"),
        Rule("decoder/logits_dense/kernel", "output.weight", _TRANSPOSE),
    )
    # The frequencies are read into the config's rope_scaling.
    return Table(rules, (r"rope_freqs\.weight",))


def interleaved_order(heads: int, head_dim: int) -> np.ndarray:
    """Returns the order that brings llama.cpp's rows of q or k back to rotate-half order, [heads * head_dim].

    llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head, Hugging Face the pairs (i, i + head_dim / 2);
    its converter moves the rows accordingly (`LlamaModel.permute` in convert_hf_to_gguf.py).
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


# Format -> the table for a config.
TABLES = {"hf": hf_table, "gguf": gguf_table}
