"""A run that is asked to stop, and goes on in a second call."""

import itertools

import pytest

from sapt_jax import continual
from sapt_jax.storage import preemption


def run_stopped_once(config, workdir, monkeypatch, checks=4, message="after step 1 of task 2/2"):
    """The scores of a run that stops at this one of its checks, and then goes on to its end.

    By default it stops after the first step of the second task, where tasks have two steps.
    """
    numbers = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "requested", lambda: next(numbers) >= checks)
        with pytest.raises(preemption.PreemptedError, match=message):
            continual.run(config, workdir)
    return continual.run(config, workdir)
