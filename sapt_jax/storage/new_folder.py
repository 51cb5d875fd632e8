"""A folder that appears only when it is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write into; it gets its name at the end, or goes when writing fails.

    Raises:
      FileExistsError: the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder or remove it")
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        # safetensors writes for the owner's eyes alone; who may list the folder may read what is in it.
        mode = unfinished.stat().st_mode & 0o666
        for file in unfinished.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
