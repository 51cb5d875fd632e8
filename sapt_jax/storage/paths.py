"""Where a run's files lie: a local folder, or an object store, through the same path objects (`etils.epath`)."""

import importlib.util
import os
from urllib.parse import unquote

from etils import epath

# Object stores, and the package that reads and writes their text files; Orbax has its own way to them.
STORES = {"gs": "gcsfs", "s3": "s3fs"}


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """A local path, or one of file:///, gs:// or s3://, as a path object.

    Raises:
      ValueError: it is empty, or of another scheme.
      ModuleNotFoundError: the package for this object store is not installed.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(f"the path of a folder is empty: name one, or a path of {':// or '.join(STORES)}://.")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return epath.Path(text)
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError(f"{text}: a file URL names no host and a whole path, as file:///home/me/run.")
        return epath.Path(unquote(rest))
    if scheme not in STORES:
        raise ValueError(f"{text}: choose a local folder, or a path of file:///, {':// or '.join(STORES)}://.")
    if importlib.util.find_spec(STORES[scheme]) is None:
        raise ModuleNotFoundError(f"{text} needs the package {STORES[scheme]}: pip install {STORES[scheme]}.")
    return epath.Path(text)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in an object store: no renaming, no appending, and a file is there only when it is whole."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in STORES))
