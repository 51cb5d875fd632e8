"""A finished run to ask: byte tokens, a random LLaMA that says different things to different inputs."""

import json
from pathlib import Path

from sapt_jax import continual
from tests.helpers.learned_runs import make_base
from tests.helpers.tiny import ORDER, tiny_config, write_tasks

FAMILY = "llama of bytes"


def finish_run(folder: Path) -> Path:
    """Writes data, base and run into a folder, and returns the run's workdir."""
    data = write_tasks(folder / "data", train=12, test=4)
    make_base(FAMILY, folder / "base")
    overrides = {"model.path": str(folder / "base"), "model.variant": "", "train.epochs": 1, "data.dev_size": 1}
    continual.run(tiny_config(data, **overrides), folder / "run")
    return folder / "run"


def predicted(workdir: Path, tested: str) -> list[dict]:
    """What the run itself answered to a task's test inputs after its last task."""
    last = len(ORDER) - 1
    file = workdir / f"predictions/{last:02d}-{ORDER[last]}/{ORDER.index(tested):02d}-{tested}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
