"""Small GGUF files, and random weights for them."""

import gguf
import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, FF, VOCAB = 2, 4, 2, 64, 256, 512, 40
METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": FF,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 5000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_gguf(file, fields, tensors=None, arch="llama"):
    """Writes a file; a tensor is an array, or (bytes [rows, row bytes] uint8, type)."""
    writer = gguf.GGUFWriter(file, arch)
    for key, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for name, tensor in (tensors or {}).items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def permute(weights, heads):
    """What llama.cpp's converter does to the rows of q and k."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def weights(seed, tied=True):
    """Random float32 weights in rotate-half order under llama.cpp's names."""
    rng = np.random.default_rng(seed)
    sizes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        sizes["output.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYERS):
        sizes |= {
            f"blk.{layer}.attn_norm.weight": (WIDTH,),
            f"blk.{layer}.attn_q.weight": (HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            f"blk.{layer}.attn_output.weight": (WIDTH, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": (WIDTH,),
            f"blk.{layer}.ffn_gate.weight": (FF, WIDTH),
            f"blk.{layer}.ffn_up.weight": (FF, WIDTH),
            f"blk.{layer}.ffn_down.weight": (WIDTH, FF),
        }
    return {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def as_stored(tensors):
    """The same weights with q and k in llama.cpp's order."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    return {
        name: permute(array, heads[part]) if (part := name.split(".")[-2]) in heads else array
        for name, array in tensors.items()
    }
