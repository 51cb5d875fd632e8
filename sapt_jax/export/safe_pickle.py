"""Reads a pickled numpy array without running anything that the pickle names.

A pickle is a program. Here it can build numbers, text and bytes, and the two or three objects that numpy writes an
array as; for these stand inert records, from which the array is made once the pickle has been read. Any other name
is an error before it is looked up.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_MOST_BYTES = 2**24


def read_array(file: Path) -> np.ndarray:
    """Reads a pickle of one numeric numpy array, as any of pickle's protocols writes it.

    Raises:
      ValueError: the file is too large, no pickle, or holds anything else.
    """
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes: a pickled vector has a few hundred")
    content = file.read_bytes()
    try:
        _check_sizes(content)
        return _to_array(*_ArrayReader(io.BytesIO(content)).read())
    except Exception as error:
        raise ValueError(f"{file} is not a pickle of one numeric numpy array: nothing else is read ({error})") from None


def _check_sizes(content: bytes) -> None:
    """Refuses places and lengths beyond the pickle's own end: a few bytes would else make Python take gigabytes."""
    for operation, argument, place in pickletools.genops(content):
        places = operation.name in ("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "FRAME")
        if places and argument > len(content):
            raise pickle.UnpicklingError(f"{operation.name} {argument} at byte {place}, of {len(content)} in all")


class _ArrayReader(pickle.Unpickler):
    """Its classes are made anew for each file: a pickle may set attributes of what it is given."""

    def __init__(self, stream: Any):
        super().__init__(stream)

        class DType:
            def __init__(self, code, *_):
                self.code, self.order = code, "|"

            def __setstate__(self, state):
                self.order = state[1]

        class Array:
            content = None

            def __setstate__(self, state):
                _, shape, dtype, fortran, data = state
                self.content = shape, dtype, "F" if fortran else "C", data

        def empty(*_):
            return Array()

        def from_buffer(data, dtype, shape, order, *_):
            array = Array()
            array.content = shape, dtype, order, data
            return array

        def latin1(text, encoding):
            if encoding != "latin1":
                raise pickle.UnpicklingError(f"bytes encoded in {encoding}")
            return text.encode("latin1")

        self._dtype, self._array = DType, Array
        self._known = {("numpy", "dtype"): DType, ("numpy", "ndarray"): Array, ("_codecs", "encode"): latin1}
        for module in ("builtins", "__builtin__"):  # no bytes at all, before protocol 3
            self._known[module, "bytes"] = lambda: b""
        for core in ("numpy.core", "numpy._core"):
            self._known[f"{core}.multiarray", "_reconstruct"] = empty
            self._known[f"{core}.numeric", "_frombuffer"] = from_buffer

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._known[module, name]

    def read(self) -> tuple[Any, ...]:
        """(shape, byte order and kind of the dtype, order of the axes, data)."""
        loaded = self.load()
        if type(loaded) is not self._array or loaded.content is None:
            raise pickle.UnpicklingError(f"it holds {type(loaded).__name__}")
        shape, dtype, order, data = loaded.content
        if type(dtype) is not self._dtype or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("its array is not of plain numbers")
        return shape, dtype.order, dtype.code, order, data


def _to_array(shape: tuple[int, ...], byte_order: str, kind: str, order: str, data: bytes) -> np.ndarray:
    if kind not in _KINDS or byte_order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError(f"its array is of dtype {byte_order}{kind}")
    if any(size < 0 for size in shape) or math.prod(shape) * int(kind[1:]) != len(data):
        raise pickle.UnpicklingError(f"{len(data)} bytes do not make an array of {kind} {shape}")
    stored = np.frombuffer(data, np.dtype(kind).newbyteorder(byte_order))
    return stored.reshape(shape, order=order).astype(np.dtype(kind))
