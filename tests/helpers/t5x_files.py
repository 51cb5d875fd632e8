"""Small T5X checkpoints in every layout, and what they hold in our tree."""

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from sapt_jax.models.shapes import t5_config_from_hf
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained.loading import load_pretrained, read_model_config

VOCAB, WIDTH, ENCODER_LAYERS, DECODER_LAYERS, HEADS, HEAD_DIM, FF, BUCKETS = 13, 10, 2, 3, 3, 4, 7, 8
INNER = HEADS * HEAD_DIM
# The same model as Hugging Face describes it; transformers 5 calls every head tied.
T5_CONFIG = {
    "model_type": "t5", "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": HEAD_DIM, "num_layers": ENCODER_LAYERS,
    "num_decoder_layers": DECODER_LAYERS, "d_ff": FF, "num_heads": HEADS, "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": BUCKETS, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True,
    "scale_decoder_outputs": False, "decoder_start_token_id": 0,
}  # fmt: skip


def make_params(seed, gated=True, tied=False, bias_per_layer=False, dtype=np.float32):
    """Our tree with random arrays, flat, from the shapes of T5X's network.py."""
    mlp = {"mlp/wo/kernel": (FF, WIDTH)} | {
        f"mlp/{k}/kernel": (WIDTH, FF) for k in (("wi_0", "wi_1") if gated else ("wi",))
    }
    sizes = {"token_embedder/embedding": (VOCAB, WIDTH)}
    if not tied:
        sizes["decoder/logits_dense/kernel"] = (WIDTH, VOCAB)
    attentions = {"encoder": ("attention",), "decoder": ("self_attention", "encoder_decoder_attention")}
    norms = {
        "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
        "decoder": ("pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"),
    }
    for stack, layers in (("encoder", ENCODER_LAYERS), ("decoder", DECODER_LAYERS)):
        of_layer = dict(mlp) | {f"{norm}/scale": (WIDTH,) for norm in norms[stack]}
        for attention in attentions[stack]:
            of_layer |= {f"{attention}/{kernel}/kernel": (WIDTH, INNER) for kernel in ("query", "key", "value")}
            of_layer[f"{attention}/out/kernel"] = (INNER, WIDTH)
        sizes |= {f"{stack}/layers/{name}": (layers, *shape) for name, shape in of_layer.items()}
        sizes[f"{stack}/{stack}_norm/scale"] = (WIDTH,)
        sizes[f"{stack}/relpos_bias/rel_embedding"] = ((layers,) if bias_per_layer else ()) + (HEADS, BUCKETS)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in sizes.items()}


def unscanned(params):
    """T5X's names and arrays where each layer is its own (t5x/examples/t5)."""
    out = {}
    for path, array in params.items():
        stack, _, rest = path.partition("/layers/")
        if rest:
            out |= {f"{stack}/layers_{layer}/{rest}": array[layer] for layer in range(len(array))}
        else:
            out[path] = array
    return out


def scanned(params, axis=1):
    """T5X's names and arrays of a scan (t5x/examples/scalable_t5): layers on `axis`, heads on their own axis."""
    out = {}
    for path, array in params.items():
        stack, _, rest = path.partition("/layers/")
        if path.endswith("rel_embedding"):
            stack = path.partition("/")[0]
            layers = ENCODER_LAYERS if stack == "encoder" else DECODER_LAYERS
            array = array if array.ndim == 3 else np.repeat(array[None], layers, axis=0)
            out[f"{stack}/{stack}/relpos_bias/rel_embedding"] = np.moveaxis(array, 0, axis)
        elif rest:
            if "attention/out" in rest:
                array = array.reshape(-1, HEADS, HEAD_DIM, WIDTH)
            elif "attention/" in rest:
                array = array.reshape(-1, WIDTH, HEADS, HEAD_DIM)
            out[f"{stack}/{stack}/{rest}"] = np.moveaxis(array, 0, axis)
        else:
            out[path] = array
    return out


def write_t5x(folder, arrays, zarr=True, version=3, driver="gfile", state=True):
    """Writes a checkpoint as T5X does, optimizer state included."""
    folder.mkdir()
    target, states = {}, {}
    for name, array in arrays.items():
        states[name] = {"v": array, "m": np.zeros(1, np.float32)}
        target[name] = array
        if zarr and array.ndim > 1:
            place = f"target.{name.replace('/', '.')}"
            metadata = {
                "shape": list(array.shape),
                "chunks": [max(1, size // 2) for size in array.shape],
                "dtype": "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str,
                "compressor": {"id": "gzip", "level": 1},
            }
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / place)}}
            tensorstore.open({**spec, "metadata": metadata}, create=True).result().write(array).result()
            target[name] = {**spec, "kvstore": {"driver": driver, "path": place}, "metadata": metadata}
    optimizer = {"target": unflatten_dict(target, sep="/")}
    if state:
        optimizer["state"] = {"step": np.int32(3), "param_states": unflatten_dict(states, sep="/")}
    index = {"version": version, "optimizer": optimizer}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))
    return folder


def model_of(path):
    return T5(t5_config_from_hf(read_model_config(path)), jnp.float32, "none")


def abstract_params(path, dtype=jnp.float32):
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    boxed = jax.eval_shape(model_of(path).init, jax.random.key(0), ids, mask, ids, mask)["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), meta.unbox(boxed))


def assert_loads_as(path, params, dtype=jnp.float32):
    loaded = flatten_dict(load_pretrained(path, abstract_params(path, dtype)), sep="/")
    assert loaded.keys() == params.keys()
    for name, array in params.items():
        assert loaded[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(loaded[name]), array, err_msg=name)
