"""The method that CONTRIBUTING.md shows works as it stands there: its file, and one line of the registry."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import REPOSITORY
from tests.helpers.run_files import committed
from tests.helpers.tiny import write_tasks


def example():
    (code,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
    return code


def test_the_example_is_about_forty_lines():
    assert 30 <= len(example().splitlines()) <= 45


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("sapt_jax", "tests"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "sapt_jax/methods/anchored.py").write_text(example(), encoding="utf-8")
    registry = copy / "sapt_jax/methods/__init__.py"
    text = registry.read_text(encoding="utf-8")
    registry.write_text(text.replace('    "sequential",\n', '    "sequential",\n    "anchored",\n'), encoding="utf-8")
    script = (
        "import sys; from sapt_jax import continual; from tests.helpers.tiny import tiny_config; "
        "settings = {'method': 'anchored', 'anchored.pull': 1e4, 'task_order': 'shout,mirror', 'train.epochs': 1}; "
        "continual.run(tiny_config(sys.argv[1], **settings), sys.argv[2])"
    )
    command = [sys.executable, "-c", script, str(write_tasks(tmp_path / "data")), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=copy, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/config.json").read_text())["anchored.pull"] == 1e4
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(record["distance"] >= 0 for record in records if record["kind"] == "train")
    first, second = committed(tmp_path / "run").values()
    slots = [name for name in first if name.startswith("['trainable'].slot")]
    moved = max(np.abs(second[name] - first[name]).max() for name in slots)
    largest = max(np.abs(first[name]).max() for name in slots)
    # A pull this strong leaves the block about where it was.
    assert 0 < moved < 0.3 * largest
    for name in slots:
        anchor = name.replace("['trainable'].slot", "['memory']['anchor']")
        np.testing.assert_array_equal(second[anchor], second[name])
