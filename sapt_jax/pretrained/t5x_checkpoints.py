"""T5X checkpoints in their native layout: a msgpack index, and TensorStore Zarr arrays beside it.

Older checkpoints hold everything in the index. Layers are separate (t5x/examples/t5) or stacked by a scan
(t5x/examples/scalable_t5); optimizer states are passed over. Neither t5x nor pickle is involved.

Format: https://github.com/google-research/t5x/blob/main/t5x/checkpoints.py
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import tensorstore

from sapt_jax.pretrained import rules, t5_weights, zarr_arrays
from sapt_jax.pretrained.rules import ArraySource
from sapt_jax.storage.new_folder import new_folder

INDEX = "checkpoint"
_VERSION = 3
_CHUNK_BYTES = 2**26
_STACKED = re.compile(r"(?P<stack>encoder|decoder)/(?:layers|encoder|decoder)/(?P<rest>.+)")
_BIAS = "relpos_bias/rel_embedding"


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One parameter, read lazily, of which numpy's basic indexing with slices returns a part.

    Attributes:
      array: a numpy array or an open TensorStore.
      heads_axis: the axis of `array` that, with the next, makes one axis heads * head_dim of ours; None where
        `array` already has our shape.
      as_bfloat16: the file keeps bfloat16's bits as uint16, as T5X did before version 3 of its format.
    """

    array: Any
    heads_axis: int | None = None
    as_bfloat16: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape, axis = tuple(self.array.shape), self.heads_axis
        return shape if axis is None else (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        part = _read(self.array[index]) if self.heads_axis is None else self._read_heads(index)
        return part.view(ml_dtypes.bfloat16) if self.as_bfloat16 else part

    def _read_heads(self, index: tuple[slice, ...]) -> np.ndarray:
        axis = self.heads_axis
        start, stop, _ = index[axis].indices(self.shape[axis])
        width = self.array.shape[axis + 1]
        heads = slice(start // width, -(-stop // width))
        part = _read(self.array[(*index[:axis], heads, slice(None), *index[axis + 1 :])])
        part = part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :])
        wanted = slice(start - heads.start * width, stop - heads.start * width)
        return part[(*(slice(None),) * axis, wanted)]


def _read(array: Any) -> np.ndarray:
    return zarr_arrays.read(array) if isinstance(array, tensorstore.TensorStore) else np.asarray(array)


def open_checkpoint(path: Path) -> ArraySource:
    """Opens the parameters of a checkpoint folder, or of an older checkpoint's one file.

    Args:
      path: the folder that holds the file `checkpoint`, or the file.

    Returns:
      The parameters under T5X's names. Stacked layers are `encoder/layers/...` and `decoder/layers/...`, on
      axis 0; relative position biases that the layers keep, all equal, are one for the stack.

    Raises:
      FileNotFoundError: there is no checkpoint, or an array that the index lists is missing.
      ValueError: the index is broken, holds no parameters, or holds layers that do not fit each other.
    """
    file, folder = (path / INDEX, path) if path.is_dir() else (path, path.parent)
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no T5X checkpoint: give the folder with the file {INDEX!r} in it")
    try:
        index = flax.serialization.msgpack_restore(file.read_bytes())
    except Exception as error:
        raise ValueError(f"{file} is not a T5X checkpoint in msgpack ({error}): fetch it anew") from error
    state = index.get("optimizer", index) if isinstance(index, Mapping) else {}
    target = state.get("target") if isinstance(state, Mapping) else None
    if not isinstance(target, Mapping):
        held = ", ".join(sorted(map(str, state))) or "nothing"
        raise ValueError(f"{file} has no optimizer/target with parameters (it holds {held}): is it a T5X checkpoint?")
    arrays = _open_arrays(folder, dict(_flatten(target)))
    as_bfloat16 = int(index.get("version", _VERSION)) < _VERSION
    return ArraySource(str(path), _share_bias(_in_our_axes(arrays, as_bfloat16)))


def read_config(path: Path) -> dict[str, Any]:
    """Reads the model's shape off a checkpoint's arrays, in the form of Hugging Face's config.json.

    T5X keeps the rest in its gin files: a gated MLP is taken to be 1.1's GELU, an ungated one 1.0's ReLU; the
    largest distance is 128 and the norm's epsilon 1e-6, as in every T5. `scanned` says whether layers are
    stacked.

    Raises:
      FileNotFoundError, ValueError: from `open_checkpoint`, or parameters that a T5 needs are missing.
    """
    shapes = open_checkpoint(path).shapes()
    scanned = any(name.startswith("encoder/layers/") for name in shapes)
    first = "layers" if scanned else "layers_0"
    per_layer = f"encoder/{_BIAS}" not in shapes
    gated = f"encoder/{first}/mlp/wi_0/kernel" in shapes

    def need(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"{path} has no parameter {name}: it is not a T5 checkpoint")
        return shapes[name]

    def layers(stack: str) -> int:
        query = f"{stack}/{first}/{'attention' if stack == 'encoder' else 'self_attention'}/query/kernel"
        if scanned:
            return need(query)[0]
        need(query)
        return len({name.split("/")[1] for name in shapes if name.startswith(f"{stack}/layers_")})

    heads, buckets = need(f"encoder/{first}/{_BIAS}" if per_layer else f"encoder/{_BIAS}")[-2:]
    vocab_size, d_model = need("token_embedder/embedding")
    return {
        "model_type": "umt5" if per_layer else "t5",
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_layers": layers("encoder"),
        "num_decoder_layers": layers("decoder"),
        "num_heads": heads,
        "d_kv": need(f"encoder/{first}/attention/query/kernel")[-1] // heads,
        "d_ff": need(f"encoder/{first}/mlp/{'wi_0' if gated else 'wi'}/kernel")[-1],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": "decoder/logits_dense/kernel" not in shapes,
        "scanned": scanned,
    }


def write_checkpoint(
    params: Mapping[str, Any], folder: Path, advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes our base parameter tree as a T5X checkpoint with separate layers and without optimizer state.

    Matrices are Zarr arrays of their own, vectors and position biases lie in the index, as T5X does it. The
    folder appears only when it is complete.

    Args:
      params: the tree of a `T5`, of arrays fully addressable by this process or of `rules.Parameter`s.
      folder: to be created, usually `checkpoint_{step}`; the step is read from its name and is 0 without one.
      advance: is told how many bytes were written, again and again.

    Raises:
      FileExistsError: the folder exists.
      ValueError: the tree has parameters that T5 has not.
    """
    bias = params["encoder"]["relpos_bias"]["rel_embedding"]
    table = t5_weights.t5x_table({"model_type": "umt5" if len(bias.shape) == 3 else "t5"})
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    with new_folder(folder) as unfinished:
        leaves = {}
        for name, array, dtype in rules.foreign_tensors(flat, table):
            if array.ndim == 2 and not name.endswith(_BIAS):
                place = f"target.{name.replace('/', '.')}"
                # Chunks of at most 64 MiB, as T5X makes them, keep each process's reads small.
                rows = max(1, min(array.shape[0], _CHUNK_BYTES // max(1, array.shape[1] * dtype.itemsize)))
                described = zarr_arrays.metadata(array.shape, (rows, array.shape[1]), dtype, "gzip")
                zarr_arrays.write(zarr_arrays.create(unfinished / place, described), array, advance)
                kept = {"driver": "file", "path": place}
                leaves[name] = {"driver": "zarr", "kvstore": kept, "metadata": described}
            else:
                leaves[name] = np.array(array, dtype)
                advance(leaves[name].nbytes)
            del array  # before the next is read
        step = re.search(r"(\d+)$", folder.name)
        state = {"step": np.int32(step[1] if step else 0), "param_states": {}}
        target = flax.traverse_util.unflatten_dict(leaves, sep="/")
        index = {"version": _VERSION, "optimizer": {"target": target, "state": state}}
        (unfinished / INDEX).write_bytes(flax.serialization.msgpack_serialize(index))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and "driver" not in value:
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _open_arrays(folder: Path, leaves: dict[str, Any]) -> dict[str, Any]:
    folders = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Mapping):
            kept = leaf.get("kvstore", {}).get("path") or leaf.get("path", "")
            # Only the name counts: a checkpoint may have been moved, or written to a bucket.
            folders[name] = folder / Path(kept.rstrip("/")).name
    if absent := sorted(place.name for place in folders.values() if not zarr_arrays.is_array(place)):
        raise FileNotFoundError(f"{folder} lacks arrays that its index lists: {', '.join(absent)}")
    opened = zarr_arrays.open_arrays(folders)
    return {name: opened[name] if name in opened else np.asarray(leaf) for name, leaf in leaves.items()}


def _in_our_axes(arrays: Mapping[str, Any], as_bfloat16: bool) -> dict[str, StoredArray]:
    """Brings scanned layers to axis 0 and marks the head axes that we keep as one; nothing is read."""
    norms = (array for name, array in arrays.items() if _STACKED.fullmatch(name) and name.endswith("/scale"))
    norm = next(norms, None)
    # Scans stack on axis 1 unless T5X's param_scan_axis says otherwise.
    d_model = arrays["token_embedder/embedding"].shape[1] if "token_embedder/embedding" in arrays else None
    scan_axis = 1 if norm is None or norm.shape[0] == d_model else 0
    ours = {}
    for name, array in arrays.items():
        match, dimensions = _STACKED.fullmatch(name), 2
        if match:
            name, dimensions = f"{match['stack']}/layers/{match['rest']}", 3
            axes = [scan_axis, *(axis for axis in range(len(array.shape)) if axis != scan_axis)]
            array = array.transpose(axes)
        heads_axis = None
        if name.endswith("/kernel") and "attention/" in name and len(array.shape) == dimensions + 1:
            heads_axis = dimensions - 2 if name.endswith("/out/kernel") else dimensions - 1
        uint16 = str(getattr(array.dtype, "name", array.dtype)) == "uint16"
        ours[name] = StoredArray(array, heads_axis, as_bfloat16 and uint16)
    return ours


def _share_bias(stored: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """Makes one bias of those of the layers, where they are equal throughout both stacks."""
    owned = {stack: {} for stack in ("encoder", "decoder")}
    for name, array in stored.items():
        stack, _, rest = name.partition("/")
        if stack in owned and rest.startswith("layers") and rest.endswith(_BIAS):
            whole = array[tuple(slice(None) for _ in array.shape)]
            owned[stack][name] = whole if whole.ndim == 3 else whole[None]
    tables = {stack: np.concatenate(list(of.values())) for stack, of in owned.items() if of}
    if not tables or any(np.any(table != table[0]) for table in tables.values()):
        return stored
    rest = {name: array for name, array in stored.items() if not any(name in of for of in owned.values())}
    return rest | {f"{stack}/{_BIAS}": StoredArray(table[0]) for stack, table in tables.items()}
