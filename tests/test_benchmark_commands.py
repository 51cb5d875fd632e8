"""The speed benchmarks run, whatever the method and the kind of block; what they measure is no matter here."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import REPOSITORY

TINY = (
    *("--config=configs/t5_tiny.py", "--rows=2", "--source=8", "--target=3"),
    *("--tasks=3", "--repeats=1", "--dtypes=float32"),
)


def run(name, *flags):
    command = [sys.executable, "-m", f"benchmarks.{name}", *TINY, *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "title"),
    [
        ("train_step", (), "train step, sapt with lora"),
        (
            "train_step",
            ("--config.method=sequential", "--config.pet.kind=prompt"),
            "train step, sequential with prompt",
        ),
        ("decode", ("--config.method=inc_lora", "--config.eval.beams=2"), "decoding, inc_lora with lora"),
    ],
)
def test_a_benchmark_times_the_first_and_the_last_task(name, flags, title):
    done = run(name, *flags)
    assert title in done.stdout, done.stderr
    # Type, task, and positive figures.
    assert re.findall(r"float32 │ +(\d+) │ +\d+ │ +[1-9][\d,]* │ +[1-9]", done.stdout) == ["1", "3"]


@pytest.mark.slow
def test_the_reflection_benchmark_is_for_methods_that_have_this_loss():
    assert "added MFLOP" in run("reflection").stdout
    done = run("reflection", "--config.method=inc_lora")
    assert done.returncode == 1 and "config.method='inc_lora' has no reflection loss" in done.stderr
