"""The mesh, the shardings of every parameter, and that splitting changes no logits: on eight fake CPU devices.

The number of devices is fixed when JAX starts, so what needs eight of them runs once in a process of its own.
"""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sapt_jax import sharding
from sapt_jax.optimization import make_optimizer
from sapt_jax.state import Leaf, abstract
from tests.helpers.paths import REPOSITORY

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
ON_EIGHT_DEVICES = """
import dataclasses, json
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np
from sapt_jax import sharding
from sapt_jax.models.kernels import causal_attention
from sapt_jax.models.families import VARIANTS, init_params, make_model

def mesh_of(*sizes):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes)))

def error_of(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)

found = {"meshes": [], "mesh_errors": []}
for sizes in ((-1, 1, 1), (2, -1, 2), (1, 1, -1), (2, 4, 1)):
    found["meshes"].append(list(mesh_of(*sizes).shape.values()))
for sizes in ((2, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 2, 2), (-2, -4, 1), (16, 1, 1)):
    found["mesh_errors"].append(error_of(mesh_of, *sizes))

mesh = mesh_of(2, 2, 2)
for name in ("llama-tiny", "t5-tiny"):
    config = dataclasses.replace(VARIANTS[name], tie_embeddings=False)
    model = make_model(config, "float32", "none")
    abstract = sharding.abstract_params(model, mesh, jnp.bfloat16)
    found[name] = {
        jax.tree_util.keystr(path): [x.shape, x.sharding.shard_shape(x.shape), str(x.dtype), str(x.sharding.spec)]
        for path, x in jax.tree_util.tree_leaves_with_path(abstract)
    }
    wide = mesh_of(1, 1, 8)
    uneven = make_model(dataclasses.replace(config, d_ff=20), "float32", "none")
    found[name + " uneven"] = error_of(sharding.abstract_params, uneven, wide, jnp.float32)

    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, config.vocab_size, (4, 6)).astype(np.int32), np.ones((4, 6), bool)
    source_mask = np.arange(6)[None] >= np.array([0, 2, 1, 3])[:, None]
    batch = {"source": ids, "source_mask": source_mask, "target": ids[:, ::-1].copy(), "target_mask": mask}
    logits = []
    for split in (mesh, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])):
        with jax.set_mesh(split), nn.logical_axis_rules(sharding.RULES):
            params = init_params(model, sharding.abstract_params(model, split, jnp.float32), 0)
            placed = sharding.place_batch(batch, split)
            logits.append(jax.jit(lambda p, b: model.apply({"params": p}, **b))(params, placed))
    found[name + " difference"] = float(np.abs(np.asarray(logits[0]) - np.asarray(logits[1])).max())
    found[name + " size"] = float(np.abs(np.asarray(logits[1])).max())
    if name == "llama-tiny":
        kernel = make_model(config, "float32", "none", "splash")
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            params = init_params(kernel, sharding.abstract_params(kernel, mesh, jnp.float32), 0)
            placed = sharding.place_batch(batch, mesh)
            of_kernel = jax.jit(lambda p, b: kernel.apply({"params": p}, **b))(params, placed)
        found["kernel difference"] = float(np.abs(np.asarray(of_kernel) - np.asarray(logits[1])).max())

arrays = [rng.standard_normal((4, 20, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
valid = np.arange(20)[None] >= np.array([0, 3, 9, 1])[:, None]
alone = np.asarray(causal_attention(*arrays, jnp.asarray(valid), 0.3, "xla"))
found["rules"] = {}
for overrides in ((), (("kv_heads", None),), (("length", "tensor"),), (("head_dim", "tensor"), ("heads", None))):
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(overrides)):
        attend = jax.jit(lambda *arrays: causal_attention(*arrays, 0.3, "splash"))
        out = np.asarray(attend(*arrays, valid))
    found["rules"][str(overrides)] = float(np.abs((out - alone) * valid[:, :, None, None]).max())

placed = sharding.place_batch({"source": np.arange(24).reshape(8, 3)}, mesh)["source"]
shards = placed.addressable_shards
found["rows"] = sorted([shard.index[0].start or 0, np.asarray(shard.data)[:, 0].tolist()] for shard in shards)
copies = sharding.replicate({"x": np.arange(6)}, mesh)["x"]
found["copies"] = [np.asarray(shard.data).tolist() for shard in copies.addressable_shards]
found["batch_error"] = error_of(sharding.check_batch_sizes, {"train.batch_size": 6, "eval.batch_size": 8}, mesh)
found["no_batch_error"] = error_of(sharding.check_batch_sizes, {"train.batch_size": 4, "eval.batch_size": 8}, mesh)
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.slow
def test_a_mesh_takes_what_is_left(found):
    assert found["meshes"] == [[8, 1, 1], [2, 2, 2], [1, 1, 8], [2, 4, 1]]


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_an_error(found):
    for error in found["mesh_errors"]:
        assert error is not None and error.startswith("config.mesh {'data': ") and "does not fit 8 device(s)" in error


# What splits each dimension of a parameter: the layers of a stack are not split, norms are whole on every device.
LLAMA_SPLITS = {
    "['token_embedder']['embedding']": ("tensor", "fsdp"),
    "['decoder']['layers']['pre_self_attention_layer_norm']['scale']": (None, None),
    "['decoder']['layers']['self_attention']['query']['kernel']": (None, "fsdp", "tensor"),
    "['decoder']['layers']['self_attention']['key']['kernel']": (None, "fsdp", "tensor"),
    "['decoder']['layers']['self_attention']['value']['kernel']": (None, "fsdp", "tensor"),
    "['decoder']['layers']['self_attention']['out']['kernel']": (None, "tensor", "fsdp"),
    "['decoder']['layers']['pre_mlp_layer_norm']['scale']": (None, None),
    "['decoder']['layers']['mlp']['wi_0']['kernel']": (None, "fsdp", "tensor"),
    "['decoder']['layers']['mlp']['wi_1']['kernel']": (None, "fsdp", "tensor"),
    "['decoder']['layers']['mlp']['wo']['kernel']": (None, "tensor", "fsdp"),
    "['decoder']['decoder_norm']['scale']": (None,),
    "['decoder']['logits_dense']['kernel']": ("fsdp", "tensor"),
}


@pytest.mark.slow
def test_every_llama_parameter_is_split_as_ruled(found):
    assert found["llama-tiny"].keys() == LLAMA_SPLITS.keys()
    for name, (shape, shard, dtype, _) in found["llama-tiny"].items():
        want = [size // (SIZES[axis] if axis else 1) for size, axis in zip(shape, LLAMA_SPLITS[name], strict=True)]
        assert (shard, dtype) == (want, "bfloat16"), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-tiny", "t5-tiny"])
def test_every_matrix_is_split_over_fsdp_and_tensor(variant, found):
    for name, (shape, shard, _, spec) in found[variant].items():
        if name.endswith(("['kernel']", "['embedding']")):
            assert 4 * np.prod(shard) == np.prod(shape), f"{name} {spec}"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-tiny", "t5-tiny"])
def test_splitting_changes_no_logits(variant, found):
    assert found[f"{variant} size"] > 1
    assert found[f"{variant} difference"] < 1e-4


@pytest.mark.slow
def test_the_attention_kernel_runs_on_each_device_s_rows_and_heads(found):
    assert found["kernel difference"] < 1e-4


@pytest.mark.slow
def test_attention_is_the_same_whatever_the_rules_split(found):
    assert len(found["rules"]) == 4
    for rules, difference in found["rules"].items():
        assert difference < 1e-5, rules


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "stacks"), [("llama-tiny", ["decoder"]), ("t5-tiny", ["encoder", "decoder"])])
def test_sizes_that_the_mesh_does_not_divide_are_all_named(variant, stacks, found):
    error = found[f"{variant} uneven"]
    assert error.startswith("config.mesh does not divide the model's sizes")
    for stack in stacks:
        for name in ("wi_0", "wi_1", "wo"):
            assert f"['{stack}']['layers']['mlp']['{name}']['kernel']: 20 over tensor=8" in error


@pytest.mark.slow
def test_rows_of_a_batch_lie_on_data_and_fsdp(found):
    """Two rows on each of four groups of devices, the same two on both devices of a tensor group."""
    assert found["rows"] == [[row, [3 * row, 3 * row + 3]] for row in (0, 0, 2, 2, 4, 4, 6, 6)]


@pytest.mark.slow
def test_copies_are_whole_everywhere(found):
    assert found["copies"] == [list(range(6))] * 8


@pytest.mark.slow
def test_batch_sizes_that_do_not_split_are_named(found):
    assert found["batch_error"].startswith("config.train.batch_size=6: batches are split over 4 devices")
    assert found["no_batch_error"] is None


class OneKernel(nn.Module):
    """A model with one parameter of the given logical axes."""

    axes: tuple

    @nn.compact
    def __call__(self, *batch):
        init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        return self.param("kernel", init, (2,) * len(self.axes), jnp.float32)


def test_an_axis_without_a_rule_is_an_error():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with pytest.raises(ValueError, match=r"no sharding rule in sharding.RULES for \['kernel'\].*'expert'"):
        sharding.abstract_params(OneKernel(("embed", "expert")), mesh, jnp.float32)
    known = sharding.abstract_params(OneKernel(("embed", "mlp")), mesh, jnp.float32)
    assert known["kernel"].shape == (2, 2)


def one_device():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def test_rules_of_the_config_replace_single_ones():
    rules = sharding.make_rules((("embed", None), ("heads", ["fsdp", "tensor"])))
    assert dict(rules) == {**dict(sharding.RULES), "embed": None, "heads": ("fsdp", "tensor")}
    with nn.logical_axis_rules(rules):
        placed = sharding.shardings({"b": Leaf((2, 3, 4, 8), ("layers", "tasks", "rank", "heads"))}, one_device())
    assert placed["b"].spec == PartitionSpec(None, None, None, ("fsdp", "tensor"))
    assert sharding.make_rules(()) == sharding.RULES


def test_rules_that_cannot_be_are_all_named():
    wrong = (("batch", "tensor"), ("expert", "data"), ("embed", "model"), "embed")
    with pytest.raises(ValueError, match="config.mesh.rules: ") as error:
        sharding.make_rules((*wrong, ("embed", "tensor")))
    for rule in wrong:
        assert repr(rule) in str(error.value)
    assert "('embed', 'tensor')" not in str(error.value)


def test_a_leaf_whose_axes_do_not_fit_its_shape_is_an_error():
    with pytest.raises(ValueError, match=r"of shape \(2, 4, 3, 5\) cannot have the logical axes \('layers', 'embed'\)"):
        Leaf((2, 4, 3, 5), ("layers", "embed"))


def test_declared_axes_without_a_rule_are_all_named():
    tree = {
        "memory": {"keys": Leaf((3, 4), ("tasks", "query")), "fisher": Leaf((4,), ("information",))},
        "slot": {"a": Leaf((2, 4, 5), ("layers", "embed", "expert"))},
    }
    with pytest.raises(ValueError, match="no sharding rule in sharding.RULES for ") as error:
        sharding.shardings(tree, one_device())
    told = str(error.value).split(" for ")[1].split("; ")
    assert told == ["['memory']['fisher']: ('information',)", "['slot']['a']: ('layers', 'embed', 'expert')"]


# One is large enough for adafactor to factor, and a path's end names another's whole.
DECLARED = {
    "slot": {"large": Leaf((256, 128), ("embed", "mlp")), "small": Leaf((2, 6), ("layers", "heads"))},
    "selector": {"small": Leaf((6,), (None,))},
}
SPLITS = {
    "'slot']['large']": ((256, 128), PartitionSpec("fsdp", "tensor")),
    "'slot']['small']": ((2, 6), PartitionSpec(None, "tensor")),
    "'selector']['small']": ((6,), PartitionSpec(None)),
}


def optimizer_state(name):
    """{path: (shape, split)} of an optimizer's state for the declared arrays, with rates of their own."""
    made = make_optimizer(name, {}, 1e-3, ((".*/small", 0.5), (".*", 1.0)), 1.0)
    opt_state = jax.eval_shape(made.init, abstract(DECLARED))
    placed = sharding.with_shardings(opt_state, sharding.shardings_like(opt_state, DECLARED, one_device()))
    leaves = jax.tree_util.tree_leaves_with_path(placed)
    return {jax.tree_util.keystr(path): (x.shape, x.sharding.spec) for path, x in leaves}


def of_field(found, field):
    """What an optimizer keeps in one field, by the path of the array that it is for."""
    return {path.split(f".{field}[")[1]: split for path, split in found.items() if f".{field}[" in path}


def counts(found):
    return {split for path, split in found.items() if path.endswith(".count")}


def test_adam_s_moments_lie_where_their_parameters_lie():
    found = optimizer_state("adamw")
    assert of_field(found, "mu") == of_field(found, "nu") == SPLITS
    assert counts(found) == {((), PartitionSpec())}


def test_adafactor_s_factors_are_whole_and_what_it_does_not_factor_lies_with_its_parameter():
    found = optimizer_state("adafactor")
    rows, columns, unfactored = (of_field(found, field) for field in ("v_row", "v_col", "v"))
    large = "'slot']['large']"
    assert {rows[large], columns[large]} == {((128,), PartitionSpec(None)), ((256,), PartitionSpec(None))}
    assert unfactored.pop(large) == ((1,), PartitionSpec(None))
    assert unfactored == {path: split for path, split in SPLITS.items() if path != large}
    assert counts(found) == {((), PartitionSpec())}


def test_activations_stay_as_they_are_without_a_mesh():
    x = jnp.arange(6.0).reshape(2, 3)
    assert sharding.constrain(x, "batch", "act_embed") is x
