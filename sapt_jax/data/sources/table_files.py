"""Rows of parquet files, and of folders as `datasets.DatasetDict.save_to_disk` leaves them."""

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sapt_jax.data.task import read_json
from sapt_jax.storage.names import check_name

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)")


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split: `{split}.parquet`, `{split}-*.parquet` or `data/{split}-*.parquet`.

    Raises:
      ValueError: a part that the others' names count is missing.
    """
    patterns = (f"{split}.parquet", f"{split}-*.parquet", f"data/{split}-*.parquet")
    return _whole([file for pattern in patterns for file in sorted(folder.glob(pattern))])


def saved_files(folder: Path, split: str) -> list[Path]:
    """The files of a split that `save_to_disk` wrote: those that state.json names, whatever else lies beside them.

    Raises:
      ValueError: state.json is not one of the library's, or names a file that is no plain name.
      FileNotFoundError: a file that state.json names, or a split that dataset_dict.json names, is missing.
    """
    listed = folder / _SPLITS
    if listed.is_file() and not (folder / split).is_dir():
        about = read_json(listed)
        if isinstance(about, dict) and split in (about.get("splits") or ()):
            raise FileNotFoundError(f"{folder / split} is missing, which {listed} names. Save the dataset anew.")
    state = folder / split / _STATE
    if not state.is_file():
        # Files of the operating system begin with a dot, those that the library keeps what it computed in with cache-.
        files = sorted((folder / split).glob("*.arrow"))
        return _whole([file for file in files if not file.name.startswith((".", "cache-"))])
    about = read_json(state)
    entries = about.get("_data_files") if isinstance(about, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{state} has no list "_data_files". Save the dataset anew.')
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    files = [folder / split / check_name(name, f"{state}: _data_files") for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which {state} names. Save the dataset anew.")
    return files


def _whole(files: list[Path]) -> list[Path]:
    """Files of which some are called NAME-00000-of-00003, if none of the three is missing."""
    for match in filter(None, (_PART.fullmatch(file.name) for file in files)):
        names = [f"{match['stem']}-{i:05d}-of-{match['count']}{match['ending']}" for i in range(int(match["count"]))]
        if absent := sorted(set(names) - {file.name for file in files}):
            raise ValueError(f"{files[0].parent}: {absent[0]} is missing beside {match[0]}. Fetch it too.")
    return files


def table_rows(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """(place, row) of each row of parquet or Arrow files, in order.

    Raises:
      ValueError: a file cannot be read, or names a column twice; pyarrow is not installed.
    """
    for file in files:
        arrow = _arrow_module("pyarrow", file)
        try:
            table = _read_table(file)
            twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
            rows = [] if twice else table.to_pylist()
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file}: cannot be read: {error}. Write the file anew.") from error
        if twice:
            raise ValueError(f"{file} names the column {twice[0]!r} twice. Write the file anew.")
        for number, row in enumerate(rows):
            # Columns that a row has no value for are absent from it, as in JSON.
            yield f"{file}: row {number}", {name: value for name, value in row.items() if value is not None}


def _read_table(file: Path) -> Any:
    if file.suffix == ".parquet":
        return _arrow_module("pyarrow.parquet", file).read_table(file)
    # `save_to_disk` writes the stream format.
    with file.open("rb") as source:
        return _arrow_module("pyarrow.ipc", file).open_stream(source).read_all()


def _arrow_module(name: str, file: Path) -> Any:
    # Imported on use: nothing else needs it.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs pyarrow. Install it with: pip install pyarrow") from error
