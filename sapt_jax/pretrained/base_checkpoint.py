"""A base model as an Orbax checkpoint, which a run reads without converting anything.

BASE/params/        the parameters by Orbax, each a Zarr array of its own under its path in our tree
BASE/config.json    the model's config in Hugging Face's form, and the tokenizer's files beside it
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import orbax.checkpoint as ocp

from sapt_jax.pretrained import zarr_arrays
from sapt_jax.pretrained.rules import ArraySource, Parameter

PARAMS, _ORBAX_INDEX = "params", "_METADATA"
# Chunks of at most 16 MiB in float32, cut along both axes: whatever axis is sharded, a process reads little
# beside its part.
_CHUNK_EDGE = 2048


def is_base_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what `write_params` writes."""
    return (folder / PARAMS / _ORBAX_INDEX).is_file()


def open_params(folder: Path) -> ArraySource:
    """Opens the parameters of a base checkpoint, by their paths in our tree.

    Raises:
      ValueError: the parameters are not Zarr arrays of their own.
    """
    arrays = {
        child.name.replace(".", "/"): child for child in (folder / PARAMS).iterdir() if zarr_arrays.is_array(child)
    }
    if not arrays:
        raise ValueError(
            f"{folder / PARAMS} holds no arrays in Zarr's format: write it with python -m sapt_jax.convert from-hf"
        )
    stores = zarr_arrays.open_arrays(arrays)
    return ArraySource(str(folder), {name: zarr_arrays.Lazy(store) for name, store in stores.items()})


def write_params(parameters: Mapping[str, Parameter], folder: Path, advance: Callable[[int], None]) -> None:
    """Writes parameters into `folder`/params. Memory holds one foreign tensor and copies of one chunk.

    Args:
      parameters: by path, each with the dtype that it gets.
      folder: of the base checkpoint; it exists.
      advance: is told how many bytes were written, again and again.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (Parameter, _ParameterHandler(advance)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # OCDBT, Orbax's default, would keep what it writes in memory.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    tree = flax.traverse_util.unflatten_dict(parameters, sep="/")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute() / PARAMS, args=ocp.args.PyTreeSave(tree))


class _ParameterHandler(ocp.type_handlers.NumpyHandler):
    """How Orbax saves a `Parameter`: as a numpy array, of which one piece is read, written and let go at a time."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__()
        self._advance = advance

    async def serialize(
        self, values: Sequence[Parameter], infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None
    ) -> Sequence[Any]:
        for parameter, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            edges = (1,) * (len(parameter.shape) - 2) + (_CHUNK_EDGE,) * 2
            chunks = tuple(map(min, edges[-len(parameter.shape) :], parameter.shape))
            described = zarr_arrays.metadata(parameter.shape, chunks, parameter.dtype, "zstd")
            store = zarr_arrays.create(Path(info.path), described)
            for place in parameter.places:
                zarr_arrays.write(store[place] if place else store, parameter.read(place), self._advance)
        return []
