"""One process at a time works in a workdir.

    WORKDIR/lock    while a run is going on: who holds it

The system lets go of the lock when its process ends, however it does. In an object store there is none.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from sapt_jax.storage.paths import as_path, is_remote

_LOCK = "lock"


@contextlib.contextmanager
def hold(workdir: str | Path) -> Iterator[None]:
    """Holds a workdir, which is made where it is not there yet; what is left empty at the end goes again.

    Of several processes of one run the first holds it for all.

    Raises:
      ValueError: another process holds it; names that one.
      OSError: the folder cannot be made or written.
    """
    if is_remote(workdir) or jax.process_index() != 0:
        yield
        return
    folder = Path(as_path(workdir)).absolute()
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _LOCK
    try:
        with _locked(file) as held:
            held.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            held.flush()
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator:
    """The open file, locked and empty."""
    while True:
        with file.open("a+", encoding="utf-8") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                opened.seek(0)
                holder = opened.readline().strip() or "another process"
                raise ValueError(
                    f"{file.parent} is in use by {holder}. Wait until it ends, or take another --workdir."
                ) from None
            # Between opening and locking the one that held it may have taken the file away.
            if file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                opened.truncate(0)
                yield opened
                return
