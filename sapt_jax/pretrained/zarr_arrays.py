"""Arrays on disk in Zarr's format, one folder each, read and written a few chunks at a time."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

_CHUNKS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A TensorStore that is read when it is indexed."""

    store: tensorstore.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return read(self.store[index])


def is_array(folder: Path) -> bool:
    """Whether an array lies in a folder."""
    return (folder / ".zarray").is_file()


def open_arrays(folders: Mapping[str, Path]) -> dict[str, tensorstore.TensorStore]:
    """Opens arrays for reading any part of them.

    Zarr takes a chunk that is not there for zeros, and so writers may leave one out. No weights are zero throughout a
    chunk, and one that is missing was lost: to read it is an error.

    Args:
      folders: where each lies.

    Raises:
      ValueError: naming an array whose description is broken.
    """
    context = tensorstore.Context()
    opened = {}
    for name, folder in folders.items():
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
        opened[name] = tensorstore.open({**spec, "fill_missing_data_reads": False}, read=True, context=context)
    stores = {}
    for name, future in opened.items():
        try:
            stores[name] = future.result()
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{folders[name]} is no Zarr array ({_first_line(error)}): fetch it anew") from error
        if 0 in stores[name].shape:
            raise ValueError(
                f"{folders[name]} is an array of shape {stores[name].shape}, without values: fetch it anew"
            )
    return stores


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def read(store: tensorstore.TensorStore) -> np.ndarray:
    """Reads a TensorStore, or a part or transposition of one. Beside the result, memory holds a few chunks."""
    layout, lowest = store.chunk_layout, store.domain.inclusive_min
    out = np.empty(store.shape, store.dtype.numpy_dtype)
    slices = []
    for low, size, step, origin in zip(lowest, store.shape, layout.read_chunk.shape, layout.grid_origin, strict=True):
        first = low + step - (low - origin) % step
        ends = [low, *range(first, low + size, step), low + size]
        slices.append([slice(*pair) for pair in itertools.pairwise(ends)])
    chunks = itertools.product(*slices)
    while batch := list(itertools.islice(chunks, _CHUNKS_AT_ONCE)):
        reads = [store[chunk].read() for chunk in batch]
        for chunk, future in zip(batch, reads, strict=True):
            place = tuple(slice(one.start - low, one.stop - low) for one, low in zip(chunk, lowest, strict=True))
            try:
                out[place] = future.result()
            except (ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"{store.kvstore.path} lacks a chunk, or has a broken one ({_first_line(error)}): fetch it anew"
                ) from error
    return out


def metadata(shape: Sequence[int], chunks: Sequence[int], dtype: Any, compressor: str) -> dict[str, Any]:
    """What Zarr stores of an array: `chunks` is the shape of one, `compressor` a name such as "zstd"."""
    return {
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else np.dtype(dtype).str,
        "compressor": {"id": compressor, "level": 1},
    }


def create(folder: Path, described: Mapping[str, Any]) -> tensorstore.TensorStore:
    """Creates an array, as `metadata` describes it, in a folder that does not exist."""
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}, "metadata": dict(described)}
    # A chunk that is not there can then only be one that was lost.
    return tensorstore.open({**spec, "store_data_equal_to_fill_value": True}, create=True).result()


def write(store: tensorstore.TensorStore, array: np.ndarray, advance: Callable[[int], None]) -> None:
    """Writes an array, cast to the store's dtype, chunk by chunk: beside it, memory holds copies of one chunk.

    Args:
      store: an open TensorStore of the array's shape.
      array: the values, in any layout.
      advance: is told how many bytes each chunk had.
    """
    dtype, steps = store.dtype.numpy_dtype, store.chunk_layout.write_chunk.shape
    starts = [range(0, size, step) for size, step in zip(array.shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        ends = map(min, np.add(corner, steps).tolist(), array.shape)
        chunk = tuple(map(slice, corner, ends))
        part = np.ascontiguousarray(array[chunk], dtype)
        store[chunk].write(part).result()
        advance(part.nbytes)
