"""Every task alone: which block answers, that no other one matters, and a run that is stopped and goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.models.families import VARIANTS, make_model
from tests.helpers.run_files import assert_same_arrays, committed, predictions
from tests.helpers.stopped import run_stopped_once
from tests.helpers.tiny import tiny_config, tiny_method, write_tasks
from tests.helpers.training import train
from tests.helpers.trees import at, empty_frozen, fresh, init_base, random_frozen

MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
BASE = init_base(MODEL)
METHOD = tiny_method("single_task")


def weights(frozen, task, rows=3, training=False):
    return METHOD.weights(frozen, fresh(METHOD, MODEL, BASE, 0), jnp.zeros((rows, 5)), task, training).tolist()


def test_an_input_is_answered_by_the_block_of_the_task_that_it_is_of():
    frozen = random_frozen(METHOD, MODEL, BASE, 3, seed=1)
    for rows in (0, 1, 2):
        assert weights(frozen, at(2, rows=jnp.int32(rows))) == [np.eye(3)[rows].tolist()] * 3
    assert weights(frozen, at(2, rows=jnp.array([2, 0, 1]))) == np.eye(3)[[2, 0, 1]].tolist()
    assert weights(frozen, at(1), training=True) == [[0, 1, 0]] * 3
    withdrawn = frozen.replace(enabled=jnp.asarray([True, False, True]))
    assert weights(withdrawn, at(2, rows=jnp.array([2, 0, 1]))) == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(
        ValueError, match="config.method='single_task' cannot answer an input whose task it is not told"
    ):
        weights(frozen, at(2))


@pytest.mark.slow
def test_a_task_learns_the_same_whatever_was_learned_before():
    trained = []
    for frozen in (empty_frozen(METHOD, MODEL, BASE, 3), random_frozen(METHOD, MODEL, BASE, 3, seed=2)):
        trained.append(train(METHOD, MODEL, (frozen, fresh(METHOD, MODEL, BASE, 4)), at(1))[0])
    jax.tree.map(np.testing.assert_array_equal, *trained)


@pytest.mark.slow
def test_a_stopped_run_answers_every_task_as_after_its_own_training(tmp_path, monkeypatch):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    config = tiny_config(data_dir, **{"method": "single_task", "task_order": "shout,mirror", "train.epochs": 1})
    scores = continual.run(config, tmp_path / "whole")
    assert scores["protocol"]["needs_task_id"]
    assert scores["matrix"][0][0] == scores["matrix"][1][0]
    whole = predictions(tmp_path / "whole")
    texts = {}
    for name, lines in whole.items():
        rows = [json.loads(line) for line in lines.splitlines()]
        own = name.endswith("01-mirror.jsonl")
        assert [row["attention_weights"] for row in rows] == [[float(not own), float(own)]] * 5
        texts[name] = [row["prediction"] for row in rows]
    assert texts["predictions/00-shout/00-shout.jsonl"] == texts["predictions/01-mirror/00-shout.jsonl"]
    again = run_stopped_once(config, tmp_path / "stopped", monkeypatch)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert_same_arrays(committed(tmp_path / "stopped"), committed(tmp_path / "whole"))
    assert predictions(tmp_path / "stopped") == whole
