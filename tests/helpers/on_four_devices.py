"""Run by tests.pretrained.test_hf in an interpreter with 4 devices: a tensor is read once, straight into its shards."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sapt_jax.pretrained import llama_weights, rules
from tests.helpers.hf_files import CONFIG, HEAD_DIM, HEADS, LAYERS, WIDTH, assert_is_ours, hf_tensors, shapes


class CountingSource(rules.ArraySource):
    """Records how many elements were read of each tensor."""

    read_elements: dict = {}

    def read(self, name, index):
        part = super().read(name, index)
        self.read_elements[name] = self.read_elements.get(name, 0) + part.size
        return part


def check_sharded_loading():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "token_embedder/embedding": P(None, "model"),
        "decoder/layers/self_attention/query/kernel": P(None, "data", "model"),
        "decoder/layers/mlp/wo/kernel": P(None, "model", "data"),
        "decoder/logits_dense/kernel": P("data", None),
    }
    target = unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs.get(path, P())))
            for path, shape in shapes().items()
        },
        sep="/",
    )
    tensors = hf_tensors(4)
    source = CountingSource("memory", tensors)
    params = rules.load(source, llama_weights.hf_table(CONFIG), target)
    assert_is_ours(params, tensors)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, target)
    # Devices that hold the same part share one read, so that no element is read twice.
    assert source.read_elements == {name: array.size for name, array in tensors.items()}
    # A permuted axis, cut between two shards, as a table for GGUF has it.
    order = np.random.default_rng(0).permutation(HEADS * HEAD_DIM)
    table = rules.Table((rules.Rule("kernel", "q.{layer}", (1, 0), order),))
    layers = {f"q.{i}": tensors[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(LAYERS)}
    sharding = NamedSharding(mesh, P(None, "data", "model"))
    leaf = jax.ShapeDtypeStruct((LAYERS, WIDTH, HEADS * HEAD_DIM), jnp.float32, sharding=sharding)
    loaded = rules.load(rules.ArraySource("memory", layers), table, {"kernel": leaf})["kernel"]
    np.testing.assert_array_equal(loaded, np.stack([array[order].T for array in layers.values()]))


if __name__ == "__main__":
    check_sharded_loading()
