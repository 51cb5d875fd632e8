"""The loop over one task: its length, best-on-dev, early stop, and what it logs."""

import json
import logging

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sapt_jax import continual
from sapt_jax import fit as fit_module
from sapt_jax import run as run_module
from sapt_jax.fit import _after_evaluation, total_steps
from sapt_jax.methods.sapt import Sapt
from sapt_jax.programs import Programs, make_programs
from sapt_jax.storage.checkpoints import Loop, latest_step
from tests.helpers.run_files import assert_same_arrays, committed
from tests.helpers.tiny import tiny_config, write_tasks

pytestmark = pytest.mark.slow


def test_steps_of_a_task(tmp_path):
    config = tiny_config(tmp_path, **{"train.epochs": 3, "train.batch_size": 8})
    assert total_steps(config, 17) == 9
    config.train.max_steps = 5
    assert total_steps(config, 17) == 5


def test_steps_of_a_task_as_the_released_code_counts_them():
    """The steps of its SuperNI runs: transformers rounds an epoch's updates of four micro-batches of 8 down."""
    config = tiny_config("", **{"train.epochs": 100, "train.batch_size": 32, "train.accumulation": 4})
    rows = (1000, 975, 338, 160, 142, 126)
    assert [total_steps(config, n) for n in rows] == [3200, 3100, 1100, 500, 500, 400]
    config.train.partial_batch = "drop"
    assert [total_steps(config, n) for n in rows] == [3100, 3000, 1000, 500, 400, 400]


def evaluations(scores, patience, best_of_equals="last"):
    loop, options = Loop(), ConfigDict({"patience": patience, "best_of_equals": best_of_equals})
    for number, score in enumerate(scores, 1):
        loop = _after_evaluation(Loop(number, loop.best_step, loop.best_score, loop.stale), score, options)
        if loop.finished:
            break
    return loop


def test_best_is_the_last_of_equals_or_the_first_and_patience_counts_evaluations_without_gain():
    assert evaluations([1.0, 3.0, 2.0], 0) == Loop(3, 2, 3.0, 1, False)
    assert evaluations([1.0, 3.0, 3.0], 0) == Loop(3, 3, 3.0, 1, False)
    assert evaluations([1.0, 3.0, 3.0, 2.0], 0, "first") == Loop(4, 2, 3.0, 2, False)
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


@pytest.mark.parametrize(("every", "evaluated"), [(2, [4]), (5, [])])
def test_without_an_evaluation_at_the_end_the_best_is_of_whole_periods(tmp_path, every, evaluated):
    """Three epochs of two updates; where no period is whole, the last state is kept."""
    data_dir = write_tasks(tmp_path / "data", tasks=("shout",))
    changes = {"train.epochs": 3, "train.evaluate_at_end": False, "train.eval_every_epochs": every}

    def learn(name, **overrides):
        continual.run(tiny_config(data_dir, task_order="shout", **changes, **overrides), tmp_path / name)
        return committed(tmp_path / name)

    found = learn("run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "dev"] == evaluated
    assert max(record["step"] for record in records if record["kind"] == "train") == 6
    # What was kept is what a task of so many updates ends with.
    ended = learn("ended", **{"train.max_steps": evaluated[0] if evaluated else 6})
    assert_same_arrays(found, ended)
    with pytest.raises(AssertionError):
        assert_same_arrays(found, learn("other", **{"train.max_steps": 3}))


@pytest.mark.parametrize(("kl_ratio", "warned"), [(1e4, True), (0.0, False)])
def test_a_closed_gate_is_told(tmp_path, caplog, kl_ratio, warned):
    """A reflection loss this strong leaves the second task no attention."""
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    overrides = {"sapt.kl_ratio": kl_ratio, "train.epochs": 8, "optimizer.learning_rate": 3e-2, "data.dev_size": 1}
    overrides["train.eval_every_epochs"] = 8
    config = tiny_config(data_dir, task_order="shout,mirror", **overrides)
    with caplog.at_level(logging.WARNING, logger="sapt_jax.fit"):
        continual.run(config, tmp_path / "run")
    told = [record.getMessage() for record in caplog.records if "the mean attention on the new slot" in record.message]
    assert bool(told) == warned
    assert all(message.startswith("mirror") for message in told)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout",))
    overrides = {"train.epochs": 6, "train.checkpoint_every_steps": 2, "train.log_every_steps": 1, "data.dev_size": 0}
    config = tiny_config(data_dir, task_order="shout", **overrides)
    place_batch, handed = fit_module.place_batch, []

    def poisoned(batch, mesh):
        handed.append(1)
        placed = place_batch(batch, mesh)
        if len(handed) == 6:
            # No token counts, and the mean over none is not finite.
            placed["target_mask"] = placed["target_mask"] & False
        return placed

    def broken(*arguments):
        nll, logs = token_loss(*arguments)
        return nll / arguments[5]["target_mask"].any(), logs

    token_loss = Sapt.task_loss
    monkeypatch.setattr(Sapt, "task_loss", broken)
    monkeypatch.setattr(fit_module, "place_batch", poisoned)
    message = "step 6 of task 1/1 shout: the loss is nan and the gradient's norm 0 at learning rate 0.01. The step"
    with pytest.raises(FloatingPointError, match=message):
        continual.run(config, tmp_path / "run")
    assert latest_step(tmp_path / "run/tasks/00-shout") == 4
    monkeypatch.undo()
    continual.run(config, tmp_path / "run")
    continual.run(config, tmp_path / "whole")
    assert_same_arrays(committed(tmp_path / "run"), committed(tmp_path / "whole"))


def test_the_loop_moves_nothing_between_host_and_device_that_it_does_not_name(tmp_path, monkeypatch):
    """A batch and a task are placed explicitly; a number that slipped into a call of the step would be an error."""
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    guarded = []

    class Guarded(Programs):
        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            if name != "train_step":
                return found

            def step(*arguments):
                guarded.append(1)
                with jax.transfer_guard("disallow"):
                    return found(*arguments)

            return step

    monkeypatch.setattr(run_module, "make_programs", lambda *parts: Guarded(**vars(make_programs(*parts))))
    continual.run(tiny_config(data_dir, task_order="shout,mirror"), tmp_path / "run")
    assert len(guarded) == 8


def test_the_profiler_records_the_steps_asked_for(tmp_path):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout",))
    overrides = {"train.profile_steps": (2, 3), "data.dev_size": 0}
    continual.run(tiny_config(data_dir, task_order="shout", **overrides), tmp_path / "run")
    (trace,) = (tmp_path / "run/tensorboard/plugins/profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000
