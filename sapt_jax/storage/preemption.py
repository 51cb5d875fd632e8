"""A run that is to stop: SIGTERM, which clusters send some seconds before they take a machine away.

On several hosts the signal reaches one of them. JAX's coordination service tells all, and they agree on the next check
that none of them has passed, so that they stop at the same one.
"""

import itertools
import signal
import threading

from jax.experimental import multihost_utils

_asked = threading.Event()
_checks = itertools.count(1)

# What a shell makes of a program that SIGTERM ended.
EXIT_CODE = 128 + signal.SIGTERM


class PreemptedError(Exception):
    """The run was asked to stop, and everything that it needs to go on is saved."""


def watch() -> None:
    """Makes SIGTERM a wish of this process instead of its end. Where processes are several, JAX does so."""
    signal.signal(signal.SIGTERM, lambda *_: _asked.set())


def requested() -> bool:
    """Whether to save and stop here. All processes have to ask as often, and get the same answer."""
    if not _asked.is_set() and multihost_utils.reached_preemption_sync_point(next(_checks)):
        _asked.set()
    return _asked.is_set()
