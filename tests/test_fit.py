"""The loop over one task: its length, best-on-dev, early stop, and what it logs."""

import json
import logging

import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.fit import _after_evaluation, total_steps
from sapt_jax.storage.checkpoints import Loop
from tests.helpers.tiny import tiny_config, write_tasks


def test_steps_of_a_task(tmp_path):
    config = tiny_config(tmp_path, **{"train.epochs": 3, "train.batch_size": 8})
    assert total_steps(config, 17) == 9
    config.train.max_steps = 5
    assert total_steps(config, 17) == 5


def evaluations(scores, patience):
    loop = Loop()
    for number, score in enumerate(scores, 1):
        loop = _after_evaluation(Loop(number, loop.best_step, loop.best_score, loop.stale), score, patience)
        if loop.finished:
            break
    return loop


def test_best_is_the_last_of_equals_and_patience_counts_evaluations_without_gain():
    assert evaluations([1.0, 3.0, 2.0], 0) == Loop(3, 2, 3.0, 1, False)
    assert evaluations([1.0, 3.0, 3.0], 0) == Loop(3, 3, 3.0, 1, False)
    assert evaluations([3.0, 2.0, 1.0, 9.0], 2) == Loop(3, 1, 3.0, 2, True)


def test_early_stop_keeps_the_best_and_logs_every_interval(tmp_path):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout",))
    overrides = {"train.epochs": 9, "train.patience": 1, "optimizer.learning_rate": 0.0, "train.log_every_steps": 3}
    continual.run(tiny_config(data_dir, task_order="shout", **overrides), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Nothing is learned: the second evaluation is no better than the first.
    assert [record["step"] for record in records if record["kind"] == "dev"] == [2, 4]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [2, 3, 4]
    assert all(np.isfinite(record["loss"]) for record in trained)


@pytest.mark.parametrize(("kl_ratio", "warned"), [(1e4, True), (0.0, False)])
def test_a_closed_gate_is_told(tmp_path, caplog, kl_ratio, warned):
    """A reflection loss this strong leaves the second task no attention."""
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    overrides = {"train.epochs": 8, "optimizer.learning_rate": 3e-2, "data.dev_size": 1, "train.eval_every_epochs": 8}
    config = tiny_config(data_dir, task_order="shout,mirror", kl_ratio=kl_ratio, **overrides)
    with caplog.at_level(logging.WARNING, logger="sapt_jax.fit"):
        continual.run(config, tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if "the mean attention on the new slot" in record.message]
    assert bool(told) == warned
    assert all(message.startswith("mirror") for message in told)
