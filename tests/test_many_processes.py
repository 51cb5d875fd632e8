"""Two processes of one run on this machine, with gloo between them: one is killed, one is asked to stop, and the run
ends as in a single process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from sapt_jax import sharding
from sapt_jax.storage import preemption
from tests.helpers.paths import REPOSITORY
from tests.helpers.run_files import assert_same_arrays, committed, predictions
from tests.helpers.tiny import write_tasks

pytestmark = pytest.mark.slow

CONFIG = """
from tests.helpers.tiny import tiny_config

def get_config():
    return tiny_config({data_dir!r}, task_order="shout,mirror", **{{
        "train.epochs": 4, "train.eval_every_epochs": 4, "train.checkpoint_every_steps": 3,
    }})
"""


class Run:
    """A tiny run as a user starts it."""

    def __init__(self, folder):
        self.started = []
        write_tasks(folder / "data", ("shout", "mirror"))
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(data_dir=str(folder / "data")))

    def start(self, workdir, devices=1, flags=()):
        command = [sys.executable, "-m", "sapt_jax.main", f"--config={self.config}", f"--workdir={workdir}", *flags]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(REPOSITORY),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **pipes))
        return self.started[-1]

    def start_pair(self, workdir):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        return [
            self.start(workdir, flags=(coordinator, "--num_processes=2", f"--process_id={number}"))
            for number in range(2)
        ]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    for process in run.started:
        process.kill()
        process.communicate()


def wait_until(processes, happened):
    while not happened():
        for process in processes:
            assert process.poll() is None, f"ended too early: {process.communicate()}"
        time.sleep(0.02)


def outputs(processes):
    """(exit codes, stdout of each, stderr of each) when all have ended."""
    texts = [process.communicate(timeout=1800) for process in processes]
    return [process.returncode for process in processes], *zip(*texts, strict=True)


@pytest.mark.slow
def test_two_processes_end_as_one_whatever_happens_to_them(run, tmp_path):
    """Bit for bit as one process with two devices: these have the same halves of each batch, and a sum of two terms."""
    workdir = tmp_path / "pair"
    alone = run.start(tmp_path / "alone", devices=2)
    steps = workdir / "tasks/00-shout/steps"

    pair = run.start_pair(workdir)
    wait_until(pair, lambda: any(path.name.isdigit() for path in steps.glob("*")))
    pair[1].kill()
    # What a cluster does with the others of a job when one is gone.
    pair[0].kill()
    assert outputs(pair)[0] == [-signal.SIGKILL, -signal.SIGKILL]

    started = (workdir / "config.json").stat().st_mtime_ns
    pair = run.start_pair(workdir)
    wait_until(pair, lambda: (workdir / "config.json").stat().st_mtime_ns > started)
    pair[1].send_signal(signal.SIGTERM)
    codes, _, errors = outputs(pair)
    assert codes == [preemption.EXIT_CODE] * 2, errors
    assert "stopped after step" in errors[0] and "The same command goes on from there." in errors[0]
    assert "stopped" not in errors[1]
    assert not (workdir / "scores.json").exists()

    codes, printed, errors = outputs(run.start_pair(workdir))
    assert codes == [0, 0], errors
    assert "after training" in printed[0] and "task" not in printed[1]
    codes, _, errors = outputs([alone])
    assert codes == [0], errors
    assert_same_arrays(committed(workdir), committed(tmp_path / "alone"))
    assert predictions(workdir) == predictions(tmp_path / "alone")
    matrices = [json.loads((folder / "scores.json").read_text())["matrix"] for folder in (workdir, tmp_path / "alone")]
    assert matrices[0] == matrices[1] and np.isfinite(matrices[0][1]).all()


@pytest.mark.slow
def test_a_single_process_saves_and_stops_at_sigterm(run, tmp_path):
    workdir = tmp_path / "stopped"
    process = run.start(workdir)
    wait_until([process], (workdir / "config.json").exists)
    process.send_signal(signal.SIGTERM)
    codes, _, errors = outputs([process])
    assert codes == [preemption.EXIT_CODE], errors
    assert "stopped after step 1 of task 1/2 shout, and saved" in errors[0]
    assert [path.name for path in (workdir / "tasks/00-shout/steps").iterdir()] == ["1"]


@pytest.mark.slow
def test_flags_of_processes_go_together(run, tmp_path):
    codes, _, errors = outputs([run.start(tmp_path / "run", flags=("--coordinator=127.0.0.1:1",))])
    assert codes == [1] and errors[0].strip().splitlines()[-1].startswith("error: --coordinator, --num_processes and")


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


class FakeMesh:
    """What `batch_slices` sees of a mesh: which process has the device at each place."""

    def __init__(self, processes):
        self.devices = np.vectorize(Device, otypes=[object])(np.array(processes))
        self.shape = dict(zip(sharding.AXES, self.devices.shape, strict=True))


@pytest.mark.parametrize(
    ("processes", "slices"),
    [
        # [data, fsdp, tensor]: a process for each of data; two that interleave; tensor groups that span two processes.
        ([[[0, 0]], [[1, 1]]], {0: 0, 1: 1}),
        ([[[1], [0]], [[0], [1]]], {1: 0, 0: 1}),
        ([[[0, 1]], [[2, 3]]], {0: 0, 1: 0, 2: 1, 3: 1}),
        ([[[0, 1]]], {0: 0, 1: 0}),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same(processes, slices):
    assert sharding.batch_slices(FakeMesh(processes)) == slices


@pytest.mark.parametrize("processes", [[[[0]], [[0]], [[1]]], [[[0, 1]], [[1, 2]]]])
def test_uneven_shares_of_a_batch_are_an_error(processes):
    with pytest.raises(ValueError, match="processes unequal or overlapping parts of a batch"):
        sharding.check_batch_sizes({"train.batch_size": 6}, FakeMesh(processes))
