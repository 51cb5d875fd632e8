"""What a task cost: seconds and peak memory, in costs.json beside its checkpoints.

    WORKDIR/tasks/00-NAME/costs.json

It is written just before the task is committed, so that a run that goes on later tells what was measured then.
"""

import dataclasses
import json
import resource
import sys
import time
from pathlib import Path

import jax

from sapt_jax.storage.paths import as_path
from sapt_jax.storage.text_files import write_text_atomically

_FILE = "costs.json"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What some work took.

    Attributes:
      seconds: of wall-clock time, compilation included.
      peak_bytes: the most memory in use at once: of an accelerator the highest of this host's devices since the process
        began, which none of them forgets; where there is none, of the whole process since the task began.
      peak_of: "device" or "process".
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    peak_of: str = ""

    def __add__(self, later: "Costs") -> "Costs":
        """Of both, one after the other."""
        return Costs(self.seconds + later.seconds, max(self.peak_bytes, later.peak_bytes), later.peak_of)


class Meter:
    """Measures from when it was made."""

    def __init__(self):
        self._start = time.monotonic()

    def read(self) -> Costs:
        """What was spent since."""
        return Costs(time.monotonic() - self._start, *_peak())


def forget_peak() -> None:
    """Lets the peak of the process begin anew, where the system can do that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def write_costs(folder: Path, costs: Costs) -> None:
    """Writes the costs of the task in this folder; only process 0 of a run on several hosts writes."""
    if jax.process_index() == 0:
        write_text_atomically(as_path(folder) / _FILE, json.dumps(dataclasses.asdict(costs), indent=1) + "\n")


def read_costs(folder: Path) -> Costs | None:
    """The costs of the task in this folder; None where an older version committed it.

    Raises:
      ValueError: the file is broken.
    """
    file = as_path(folder) / _FILE
    if not file.is_file():
        return None
    try:
        return Costs(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file} is not what a run wrote: delete it, and the task has no costs.") from None


def _peak() -> tuple[int, str]:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_devices = max(found.get("peak_bytes_in_use", 0) for found in stats)
    return (on_devices, "device") if on_devices else (_process_peak(), "process")


def _process_peak() -> int:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        # Kilobytes, but for macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
