"""The look at the data: its figures are those of the data it was given."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from sapt_jax.config import default_config
from sapt_jax.results.terminal import make_console
from sapt_jax.tools.inspect_data import inspect
from tests.helpers.data_fakes import random_task
from tests.helpers.paths import REPOSITORY


def write_task(root, task):
    (root / task.name).mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"input": i.input, "output": i.outputs[0]} for i in getattr(task, split)]
        (root / task.name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def config_for(root, names):
    config = default_config()
    config.benchmark, config.data_dir, config.task_order = "own", str(root), ",".join(names)
    config.model.variant, config.model.tokenizer = "t5-tiny", "bytes"
    config.pseudo_samples.source = "train"
    config.train.batch_size = config.eval.batch_size = 4
    config.data.max_source_length = 40
    return config


def test_figures_are_those_of_the_data(tmp_path):
    rng = np.random.default_rng(61)
    tasks = [random_task(rng, name, sizes=(23, 5, 9)) for name in ("one", "two")]
    for task in tasks:
        write_task(tmp_path, task)
    with (tmp_path / "one" / "test.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"input": tasks[0].train[3].input, "output": "x"}))
    out = io.StringIO()
    reports, whole = inspect(config_for(tmp_path, ["one", "two"]), make_console(out))
    assert [report.rows for report in reports] == [(23, 5, 10), (23, 5, 9)]
    seen = {instance.input for instance in tasks[0].train}
    assert reports[0].test_in_train == 1 + sum(instance.input in seen for instance in tasks[0].test)
    for task, report in zip(tasks, reports, strict=True):
        assert dict(report.answers) == Counter(instance.outputs[0] for instance in task.train)
        texts = [f"{i.input}\nOutput: " for split in (task.train, task.dev, task.test) for i in split]
        cut = sum(len(text.encode()) + 1 > 40 for text in texts)
        assert report.cut_sources == pytest.approx(cut / len(texts), abs=0.02)
        assert report.source_lengths[-1] == 40 and report.cut_targets == 0
        assert report.pseudo_samples == 4
    assert whole.rows == 23 + 5 + 10 + 23 + 5 + 9
    assert whole.batches == 2 * (6 + 2 + 3)
    assert whole.tokens < whole.positions
    for text in ("one", "bucket shapes", "padding of the training batches", "[answer]"):
        assert text in out.getvalue()


def test_names_and_texts_are_printed_as_they_are(tmp_path):
    task = random_task(np.random.default_rng(63), "[b] :smile:", sizes=(6, 2, 2))
    write_task(
        tmp_path,
        dataclasses.replace(task, train=tuple(dataclasses.replace(i, outputs=("[red]x[/b]",)) for i in task.train)),
    )
    out = io.StringIO()
    inspect(config_for(tmp_path, [task.name]), make_console(out))
    assert task.name in out.getvalue() and "'[red]x[/b]' 6" in out.getvalue()


def test_padding_counts_the_positions_of_a_soft_prompt(tmp_path):
    task = random_task(np.random.default_rng(62), "one", sizes=(23, 5, 9))
    write_task(tmp_path, task)
    config = config_for(tmp_path, ["one"])
    config.data.max_buckets = 1
    shares = {}
    for kind in ("lora", "prompt"):
        config.pet.kind, config.pet.prompt_length, config.data.source_multiple = kind, 16, 8
        (report,), _ = inspect(config, make_console(io.StringIO()))
        shares[kind] = report.train_tokens, report.train_positions
    (tokens, positions), (prompt_tokens, prompt_positions) = shares.values()
    # 23 rows in 6 batches of 4: the last row stands in for the one that is missing.
    assert prompt_tokens - tokens == 23 * 16
    assert prompt_positions - positions == 24 * 16


def test_errors_are_the_runs_own(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'three'"):
        inspect(config_for(tmp_path, ["three"]), make_console(io.StringIO()))


@pytest.mark.slow
def test_the_file_runs_by_its_path():
    """Its folder is then the first place where imports are looked for: no file in it may be called like a library."""
    command = [sys.executable, "sapt_jax/tools/inspect_data.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert "--config" in done.stdout, done.stderr
