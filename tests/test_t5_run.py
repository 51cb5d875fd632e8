"""A whole sequence of four tasks on a tiny T5, stopped inside a task and gone on with."""

import logging

import jax
import numpy as np
import pytest

from sapt_jax import continual, fit
from tests.helpers.run_files import assert_same_arrays, committed, predictions, times_compiled
from tests.helpers.tiny import TASKS, tiny_config, write_tasks

pytestmark = pytest.mark.slow


class Stopped(Exception):
    pass


def test_four_tasks_with_a_stop_inside_the_third(tmp_path, monkeypatch, caplog):
    data_dir = write_tasks(tmp_path / "data", tasks=tuple(TASKS))
    overrides = {"model.variant": "t5-tiny", "data.max_buckets": 2, "data.source_multiple": 4}
    config = tiny_config(data_dir, task_order=",".join(TASKS), **overrides)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        scores = continual.run(config, tmp_path / "whole")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(4)]).all()
    # No task compiled anything anew: one program for each batch shape.
    assert len(scores["buckets"]) == 2
    for function in ("step", "generate"):
        assert 1 <= times_compiled(caplog, function) <= 2

    saves = []
    save = fit.TaskCheckpoints.save

    def stop_at_the_fifth(self, *args):
        save(self, *args)
        saves.append(self)
        if len(saves) == 5:
            self.close()
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(fit.TaskCheckpoints, "save", stop_at_the_fifth)
        with pytest.raises(Stopped):
            continual.run(config, tmp_path / "stopped")
    assert committed(tmp_path / "stopped").keys() == {"00-shout", "01-mirror"}
    continual.run(config, tmp_path / "stopped")
    assert_same_arrays(committed(tmp_path / "whole"), committed(tmp_path / "stopped"))
    assert predictions(tmp_path / "whole") == predictions(tmp_path / "stopped")
