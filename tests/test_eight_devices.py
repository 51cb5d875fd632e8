"""Meshes of eight devices against one: the same losses, gradients, attention and answers; what is split how, and what
of it travels. The programs run in tests/helpers/on_eight_devices.py.

tests/goldens/shardings.txt holds what the meshes of the named configs split. To write it anew:

    python -m tests.test_eight_devices
"""

import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.on_eight_devices import COVER, PETS, RANK, STEPS, TARGET, TASKS
from tests.helpers.paths import REPOSITORY

pytestmark = pytest.mark.slow

GOLDENS = REPOSITORY / "tests" / "goldens" / "shardings.txt"
TOLERANCE = 1e-5
LAYERS, D_MODEL, VOCAB = 2, 32, 384
PAIRS = [(family, pet) for family in COVER for pet in PETS]

pytestmark = pytest.mark.slow


def run_programs(folder):
    """Both families at once, each in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    running = {}
    for family in COVER:
        (folder / family).mkdir()
        command = [sys.executable, "-m", "tests.helpers.on_eight_devices", str(folder / family), family]
        running[family] = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for family, process in running.items():
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, f"{family}: {output}"
        # What XLA says where it has to make an activation whole to split it otherwise.
        assert "Involuntary full rematerialization" not in output, output


def golden_text(folder):
    return "".join((folder / family / "shardings.txt").read_text() for family in COVER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    run_programs(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return {family: dict(np.load(folder / family / "results.npz")) for family in COVER}


def compare(results, family, pet, name):
    """Every array of a mesh with that of one device: numbers within the tolerance, ids equal."""
    title = f"{family} {pet}"
    found, one = (
        {key.removeprefix(of): x for key, x in results.items() if key.startswith(f"{of}task")}
        for of in (f"{title} {name} ", f"{title} one ")
    )
    assert len(found) > 20 and found.keys() <= one.keys()
    for key, x in found.items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(x, one[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{title} {name} {key}")
        else:
            np.testing.assert_array_equal(x, one[key], err_msg=f"{title} {name} {key}")


@pytest.mark.parametrize(("family", "pet"), PAIRS)
def test_a_mesh_learns_and_answers_as_one_device(family, pet, results):
    """Two tasks of two steps, with the commit between them: losses, gradients, trees, attention, answers, banks."""
    found = results[family]
    for step in range(STEPS):
        of_step = f"{family} {pet} one task 1 step {step}"
        gradients = [x for key, x in found.items() if key.startswith(of_step) and ".trace.slot" in key]
        assert gradients and all(np.abs(x).max() > 1e-3 for x in gradients)
    assert len(np.unique(found[f"{family} {pet} one task 1 end [0]['tokens']"])) > 3
    for name in COVER[family][pet]:
        compare(found, family, pet, name)


@pytest.mark.parametrize(("family", "pet"), PAIRS)
def test_a_run_goes_on_on_another_mesh(family, pet, results):
    """From the bank of the first task and the state inside the second, as the mesh before saved them."""
    for name in COVER[family][pet]:
        compare(results[family], family, pet, f"{name} restored")


def gathered(hlo):
    """Dimensions of what the all-gathers of a compiled program result in."""
    results = re.findall(r"= \(?(.*?)\)? all-gather(?:-start)?\(", hlo)
    return [tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\w\d*\[([\d,]+)\]", result)]


def is_whole_bank(dims):
    """More than one layer's blocks of a projection: the scan gathers layer by layer, as it does the weights."""
    blocks = TASKS * RANK in dims or (TASKS in dims and RANK in dims)
    return blocks and np.prod(dims) >= LAYERS * TASKS * RANK * D_MODEL


def is_logits(dims):
    return VOCAB in dims and np.prod(dims) >= TARGET * VOCAB and np.prod(dims) % (TARGET * VOCAB) == 0


def test_what_counts_as_a_gathered_bank_or_logits():
    hlo = """
      %a = f32[2,32,3,5]{3,2,1,0} all-gather(%x), channel_id=1
      %b = (f32[1,16,15]{2,1,0}, f32[1,32,15]{2,1,0}) all-gather-start(%x), channel_id=2
      %c = f32[8,7,384]{2,1,0} all-gather(%x), channel_id=3
      %d = f32[384,32]{1,0} all-gather(%x), channel_id=4
      %e = f32[2,15,32]{2,1,0} all-reduce(%x), channel_id=5
    """
    assert gathered(hlo) == [(2, 32, 3, 5), (1, 16, 15), (1, 32, 15), (8, 7, 384), (384, 32)]
    assert [is_whole_bank(dims) for dims in gathered(hlo)] == [True, False, False, False, False]
    assert [is_logits(dims) for dims in gathered(hlo)] == [False, False, False, True, False]


@pytest.mark.parametrize(("family", "pet"), [(family, pet) for family, pet in PAIRS if pet.startswith("lora")])
def test_the_train_step_gathers_neither_the_bank_nor_the_logits(family, pet, folder):
    dims = gathered((folder / family / f"{family} {pet}.hlo").read_text())
    # Weights are gathered, so that the search finds what there is.
    assert any(D_MODEL in found for found in dims)
    assert not [found for found in dims if is_whole_bank(found)]
    assert not [found for found in dims if is_logits(found)]


def test_shardings_are_the_recorded_ones(folder):
    before, now = GOLDENS.read_text().splitlines(), golden_text(folder).splitlines()
    changes = "\n".join(difflib.unified_diff(before, now, "recorded", "now", lineterm="", n=0))
    assert not changes, f"{changes}\nIf that is meant: python -m tests.test_eight_devices"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        run_programs(Path(made))
        GOLDENS.write_text(golden_text(Path(made)))
