"""Small text files: plain JSON data, and writes that a killed run cannot leave half done."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sapt_jax.storage.paths import is_remote


def read_json(file: Path | epath.Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object that a run or an export has left.

    Args:
      remedy: what to do where it is broken, for the error.

    Raises:
      ValueError: it is a folder, not UTF-8, not JSON, or holds something else.
    """
    try:
        content = json.loads(_read(file, remedy).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, an object is needed. {remedy}")
    return content


def read_json_lines(file: Path | epath.Path, remedy: str) -> list[dict[str, Any]]:
    """Reads the JSON objects of a file with one a line, as a run leaves it.

    Lines end at "\\n" and nowhere else. What stands after the last one is a line that a killed run has not finished,
    and is left out.

    Raises:
      ValueError: as of `read_json`, with the line.
    """
    rows = []
    for number, line in enumerate(_read(file, remedy).split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number} is not valid JSON ({error}). {remedy}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number} holds a {type(row).__name__}, an object is needed. {remedy}")
        rows.append(row)
    return rows


def _read(file: Path | epath.Path, remedy: str) -> bytes:
    if file.is_dir():
        raise ValueError(f"{file} is a folder where a file should be. {remedy}")
    return file.read_bytes()


def to_jsonable(value: Any) -> Any:
    """Plain JSON data: arrays become lists, mappings dicts, paths strings; NaN and infinities become None."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return to_jsonable(np.asarray(value).tolist())
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_jsonable(item) for item in items]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON")


def write_text_atomically(path: Path | epath.Path, text: str) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the run is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
