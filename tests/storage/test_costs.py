import time
from pathlib import Path

import numpy as np
import pytest

from sapt_jax.storage import costs
from sapt_jax.storage.costs import Costs, Meter, forget_peak, read_costs, write_costs


def test_costs_of_two_calls_add_up_and_the_higher_peak_stays():
    first, second = Costs(1.5, 70, "process"), Costs(2.0, 40, "device")
    assert first + second == Costs(3.5, 70, "device")
    assert Costs() + first == first


def test_a_meter_measures_from_when_it_was_made(monkeypatch):
    now = iter([100.0, 107.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert Meter().read().seconds == 7.5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_the_peak_is_of_the_process_since_it_was_forgotten():
    forget_peak()
    before = Meter().read()
    assert before.peak_of == "process"
    held = np.ones(40_000_000, np.uint8)
    during = Meter().read().peak_bytes
    assert held.nbytes * 0.9 < during - before.peak_bytes < held.nbytes * 2
    del held
    forget_peak()
    assert Meter().read().peak_bytes < during - 20_000_000


def test_on_accelerators_it_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.memory_stats = lambda: {"peak_bytes_in_use": peak}

    monkeypatch.setattr(costs.jax, "local_devices", lambda: [Device(5), Device(9)])
    read = Meter().read()
    assert (read.peak_bytes, read.peak_of) == (9, "device")


def test_costs_read_back(tmp_path):
    assert read_costs(tmp_path) is None
    write_costs(tmp_path, Costs(12.25, 3, "device"))
    assert read_costs(tmp_path) == Costs(12.25, 3, "device")
    (tmp_path / "costs.json").write_text("{}[")
    with pytest.raises(ValueError, match="costs.json is not what a run wrote: delete it"):
        read_costs(tmp_path)
