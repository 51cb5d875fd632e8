"""Base checkpoints: Orbax and our loader read what was written, in shards, in parts, within a bound of memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from sapt_jax.pretrained import base_checkpoint, rules, zarr_arrays
from sapt_jax.pretrained.loading import load_pretrained, model_table, open_pretrained
from tests.helpers.paths import REPOSITORY
from tests.helpers.t5x_files import abstract_params, make_params, unscanned, write_t5x

CONFIG = {"model_type": "t5"}


def parameters(arrays, dtype):
    source = rules.ArraySource("arrays", arrays)
    target = {name: jax.ShapeDtypeStruct(array.shape, dtype) for name, array in arrays.items()}
    return rules.open_parameters(source, rules.identity(arrays), unflatten_dict(target, sep="/"))


def write_base(folder, arrays, dtype=np.float32):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    told = []
    base_checkpoint.write_params(parameters(arrays, dtype), folder, told.append)
    assert sum(told) == sum(array.size for array in arrays.values()) * np.dtype(dtype).itemsize
    return folder


def target_like(arrays, dtype=jnp.float32):
    shapes = {name: jax.ShapeDtypeStruct(array.shape, dtype) for name, array in arrays.items()}
    return unflatten_dict(shapes, sep="/")


@pytest.mark.parametrize("dtype", (np.float32, ml_dtypes.bfloat16))
def test_orbax_and_our_loader_restore_what_was_written(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(base_checkpoint, "_CHUNK_EDGE", 4)  # several chunks, the last ones cut
    arrays = make_params(seed=1)
    arrays["decoder/decoder_norm/scale"][:] = 0.0  # a chunk equal to Zarr's filling is written too
    base = write_base(tmp_path / "base", arrays, dtype)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), target_like(arrays, dtype)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        by_orbax = flatten_dict(checkpointer.restore(base / "params", abstract), sep="/")
    ours = flatten_dict(load_pretrained(base, abstract), sep="/")
    assert by_orbax.keys() == ours.keys() == arrays.keys()
    for name, array in arrays.items():
        assert ours[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours[name]), array.astype(dtype), err_msg=name)
        np.testing.assert_array_equal(np.asarray(by_orbax[name]), array.astype(dtype), err_msg=name)


@pytest.mark.slow
def test_values_are_cast_as_direct_loading_casts_them(tmp_path):
    checkpoint = write_t5x(tmp_path / "checkpoint_0", unscanned(make_params(seed=2)))
    target = abstract_params(checkpoint, jnp.bfloat16)
    base = tmp_path / "base"
    base.mkdir()
    found = open_pretrained(checkpoint, abstract_params(checkpoint))
    base_checkpoint.write_params(found, base, lambda nbytes: None)
    (base / "config.json").write_text(json.dumps(CONFIG))
    direct, cast = load_pretrained(checkpoint, target), load_pretrained(base, target)
    jax.tree.map(np.testing.assert_array_equal, direct, cast)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cast))


def test_any_part_of_a_transposed_array_is_read(tmp_path):
    rng = np.random.default_rng(3)
    array = rng.standard_normal((7, 9, 5)).astype(np.float32)
    store = zarr_arrays.create(tmp_path / "a", zarr_arrays.metadata(array.shape, (2, 4, 5), array.dtype, "zstd"))
    zarr_arrays.write(store, array, lambda nbytes: None)
    for _ in range(40):
        axes = tuple(rng.permutation(3).tolist())
        bounds = [np.sort(rng.choice(size + 1, 2)).tolist() for size in array.transpose(axes).shape]
        index = tuple(slice(*ends) for ends in bounds)
        np.testing.assert_array_equal(zarr_arrays.read(store.transpose(axes)[index]), array.transpose(axes)[index])
    np.testing.assert_array_equal(zarr_arrays.read(store[3]), array[3])


def test_errors_name_the_base(tmp_path):
    arrays = make_params(seed=4)
    base = write_base(tmp_path / "base", arrays)
    target = target_like(arrays)
    with pytest.raises(ValueError, match=f"params holds the parameters of a base checkpoint: give {base}"):
        model_table(base / "params")
    target["token_embedder"]["embedding"] = jax.ShapeDtypeStruct((5, 10), jnp.float32)
    target["encoder"].pop("encoder_norm")
    target["encoder"]["extra"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(ValueError) as error:
        load_pretrained(base, target)
    message = str(error.value)
    assert message.startswith(f"{base} does not hold the weights of this model (1 missing, 1 unused, 1 of the wrong")
    assert "unused: encoder/encoder_norm/scale (10,)" in message and "missing: encoder/extra" in message
    assert "token_embedder/embedding is (13, 10), the model needs (5, 10)" in message
    (base / "params/token_embedder.embedding/0.0").unlink()  # a copy that lost a chunk must not become zeros
    with pytest.raises(ValueError, match="token_embedder.embedding"):
        load_pretrained(base, target_like(arrays))
    for folder in (base / "params").glob("*/"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="holds no arrays in Zarr's format"):
        load_pretrained(base, target_like(arrays))


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from sapt_jax.pretrained import zarr_arrays
from sapt_jax.pretrained.loading import load_pretrained
from jax.sharding import NamedSharding, PartitionSpec as P
read, sizes = zarr_arrays.read, []
def count(store):
    sizes.append(int(np.prod(store.shape)))
    return read(store)
zarr_arrays.read = count
want = np.load(sys.argv[2])
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
for spec, largest in ((P("fsdp", "tensor"), 4), (P("tensor"), 2), (P(None, ("fsdp", "tensor")), 4), (P(), 1)):
    sizes.clear()
    leaf = jax.ShapeDtypeStruct(want.shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    got = load_pretrained(sys.argv[1], {"w": leaf})["w"]
    assert got.sharding == leaf.sharding
    np.testing.assert_array_equal(np.asarray(got), want)
    assert max(sizes) == want.size // largest and sum(sizes) == want.size, (spec, sizes)
print("loaded")
"""


def run(script, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_each_shard_is_read_once_and_nothing_else(tmp_path):
    array = np.random.default_rng(5).standard_normal((8, 12)).astype(np.float32)
    base = write_base(tmp_path / "base", {"w": array})
    np.save(tmp_path / "w.npy", array)
    out = run(SHARDED, base, tmp_path / "w.npy", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert out == "loaded\n"


# Anonymous memory: files mapped into memory are the system's to drop. It is sampled, so a short peak may be missed;
# tracemalloc misses no array of numpy's, but sees none of TensorStore's buffers.
MEASURE = """
import json, sys, threading, time, tracemalloc
from pathlib import Path
from sapt_jax.convert import base_commands
from sapt_jax.pretrained import base_checkpoint, t5x_checkpoints
import argparse
base_checkpoint._CHUNK_EDGE, t5x_checkpoints._CHUNK_BYTES = 512, 2**20
parser = argparse.ArgumentParser()
base_commands.add_commands(parser.add_subparsers())
def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
write, peaks = base_commands._write, []
def measured(*arguments):
    before, highest, done = anonymous(), [0], threading.Event()
    def sample():
        while not done.wait(0.001):
            highest[0] = max(highest[0], anonymous())
    thread = threading.Thread(target=sample)
    thread.start()
    tracemalloc.start()
    write(*arguments)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    done.set()
    thread.join()
    peaks.append((highest[0] - before, traced))
base_commands._write = measured
def convert(*words):
    chosen = parser.parse_args(words)
    chosen.command(chosen)
source, out = sys.argv[1:]
convert("from-hf", f"--model={source}", f"--out={out}/warm_up", "--dtype=bfloat16")
convert("from-hf", f"--model={source}", f"--out={out}/base")
convert("to-t5x", f"--model={source}", f"--out={out}/checkpoint_0")
convert("from-t5x", f"--model={out}/checkpoint_0", f"--out={out}/from_t5x")
print(json.dumps(peaks[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_holds_one_tensor(tmp_path):
    from safetensors.numpy import save_file

    from sapt_jax.pretrained import t5_weights

    vocab, width, inner, ff, layers = 6_000, 512, 512, 1024, 2
    config = {
        "model_type": "t5", "vocab_size": vocab, "d_model": width, "num_layers": layers, "num_heads": 8, "d_kv": 64,
        "d_ff": ff, "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    sizes = {"query": (width, inner), "key": (width, inner), "value": (width, inner), "out": (inner, width)}
    sizes |= {"wi_0": (width, ff), "wi_1": (width, ff), "wo": (ff, width)}
    rng, flat = np.random.default_rng(6), {}
    for name in make_params(seed=0):
        kernel = name.split("/")[-2]
        if name == "token_embedder/embedding":
            shape = (vocab, width)
        elif name == "decoder/logits_dense/kernel":
            shape = (width, vocab)
        elif name.endswith("rel_embedding"):
            shape = (8, 32)
        else:
            shape = ((layers,) if "/layers/" in name else ()) + sizes.get(kernel, (width,))
        flat[name] = rng.standard_normal(shape, np.float32)
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(
        rules.to_foreign(unflatten_dict(flat, sep="/"), t5_weights.hf_table(config)), str(source / "model.safetensors")
    )
    # glibc would keep freed buffers; this returns them to the system at once.
    out = run(MEASURE, source, tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
    largest = flat["token_embedder/embedding"].nbytes
    buffers = 16 * 2**20  # of chunks of 1 MiB, and of what the interpreter needs meanwhile
    total = sum(array.nbytes for array in flat.values())
    assert total / 2 > 1.3 * largest + buffers  # not even half of the model would fit
    for anonymous, traced in json.loads(out.splitlines()[-1]):
        assert anonymous < 1.3 * largest + buffers
        assert traced < 1.3 * largest + 4 * 2**20


def test_store_is_plain_zarr(tmp_path):
    """Another reader needs nothing of ours: TensorStore opens an array by its folder."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    base = write_base(tmp_path / "base", {"encoder/w": array})
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(base / "params/encoder.w")}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), array)
