"""Replay's loss and updates against loops in float64, and a run that grows, is stopped and goes on."""

import json

import jax
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.config import check_config
from sapt_jax.data.lesson import make_lesson
from sapt_jax.methods.joint import Joint
from sapt_jax.methods.replay import Replay
from sapt_jax.results.comparison import figures
from sapt_jax.results.scores import read_scores
from tests.helpers.replayed import PET, SHARE, Linear, batches, sides, split_of, third_task
from tests.helpers.run_files import assert_same_arrays, committed, predictions, times_compiled
from tests.helpers.stopped import run_stopped_once
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at

METHOD = Replay(PET, share=SHARE)


def check_updates(model, prompt, lesson_batches, found, loss_of):
    """Five updates of a prompt, and the loss of each, against a loop that takes loss and gradient from `loss_of`."""
    trainable, metrics = found
    for batch, told in zip(lesson_batches, metrics, strict=True):
        loss, grad = loss_of(prompt, batch)
        np.testing.assert_allclose(told["loss"], loss, rtol=1e-5)
        prompt = prompt - model.rate * grad
    np.testing.assert_allclose(trainable.slot["prompt"], prompt, rtol=1e-5, atol=1e-6)
    return prompt


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_five_updates_before_and_after_a_task_equal_numpy(seed):
    model, (lesson, splits) = Linear(seed), third_task(seed)
    frozen, trainable = model.trees(METHOD, seed)
    # The task before has all of its batch for itself.
    alone = batches(make_lesson(1, {1: splits[2]}, {}, SHARE), steps=5)
    first = model.train(METHOD, (frozen, trainable), alone, 1)
    prompt = np.array(trainable.slot["prompt"], np.float64)
    prompt = check_updates(
        model, prompt, alone, first, lambda prompt, batch: model.mean_nll(prompt, batch, range(len(batch["source"])))
    )
    frozen = METHOD.end_task(frozen, first[0], None, at(1, slot=0))
    trees = model.trees(METHOD, seed, 2, frozen, first[0])
    jax.tree.map(np.testing.assert_array_equal, trees[1].slot, METHOD.pet.read(frozen.bank, 0))
    mixed = batches(lesson, steps=5)

    def loss_of(prompt, batch):
        earlier, own = sides(batch, 2)
        assert len(earlier) == 2 and own
        parts = [model.mean_nll(prompt, batch, rows) for rows in (own, earlier)]
        return tuple((1 - SHARE) * of_own + SHARE * of_earlier for of_own, of_earlier in zip(*parts, strict=True))

    check_updates(model, prompt, mixed, model.train(METHOD, trees, mixed, 2), loss_of)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["proportional", "equal"])
def test_five_updates_on_all_tasks_equal_numpy(sampling):
    model, method, rng = Linear(5), Joint(PET, sampling=sampling), np.random.default_rng(5)
    splits = {task: split_of(rng, rows, task) for task, rows in enumerate((3, 20, 9))}
    joined = batches(make_lesson(2, splits, {}, method.replay, method.equal), steps=5)
    assert not any("weight" in batch for batch in joined)
    frozen, trainable = model.trees(method, 6)
    check_updates(
        model,
        np.array(trainable.slot["prompt"], np.float64),
        joined,
        model.train(method, (frozen, trainable), joined, 2),
        lambda prompt, batch: model.mean_nll(prompt, batch, range(len(batch["source"]))),
    )


def test_what_has_no_answers_is_refused(tmp_path):
    data_dir = write_tasks(tmp_path / "data")

    def config(**overrides):
        return tiny_config(data_dir, method="replay", **overrides)

    refusals = {"none": "there are no rows", "generate": "writes samples without answers"}
    for source, message in refusals.items():
        with pytest.raises(
            ValueError, match=f'source="{source}": .*{message}.*Set config.pseudo_samples.source="train"'
        ):
            check_config(config(**{"pseudo_samples.source": source}))
    check_config(config(**{"pseudo_samples.source": "generate", "pseudo_samples.writer.answers": True}))
    pools = tmp_path / "pools"
    for name in ("shout", "mirror", "first"):
        (pools / name).mkdir(parents=True)
        rows = [{"input": "ab", "output": "AB"}, {"input": "cd", "output": "" if name == "mirror" else "CD"}]
        (pools / name / "train.json").write_text(json.dumps({"Definition": ["It."], "Instances": rows}))
    files = {"pseudo_samples.source": "files", "pseudo_samples.dir": str(pools)}
    with pytest.raises(ValueError, match="mirror/train.json: mirror-pseudo-1 has no answer.*writer.answers=True"):
        continual.run(config(**files), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="a replay share of 0.3 in batches of config.train.batch_size=8 is 2.4 rows"):
        continual.run(config(**{"replay.share": 0.3}), tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_grew_and_was_stopped_ends_like_a_whole_one(tmp_path, monkeypatch, caplog):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    overrides = {"method": "replay", "model.variant": "t5-tiny", "train.epochs": 1, "task_order": "shout,mirror"}
    overrides |= {"data.buckets": ((44, 16),), "pseudo_samples.minimum": 6, "train.log_every_steps": 1}
    config = tiny_config(data_dir, **overrides)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        scores = continual.run(config, tmp_path / "whole")
    for function in ("step", "generate"):
        assert times_compiled(caplog, function) == 1
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    steps = [[r["step"] for r in records if r["kind"] == "train" and r["task_index"] == task] for task in (0, 1)]
    # Sixteen rows by eight, and by six beside two of the task before.
    assert steps == [[1, 2], [1, 2, 3]]
    continual.run(tiny_config(data_dir, **{**overrides, "task_order": "shout"}), tmp_path / "grown")
    again = run_stopped_once(config, tmp_path / "grown", monkeypatch, checks=2)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert_same_arrays(committed(tmp_path / "grown"), committed(tmp_path / "whole"))
    assert predictions(tmp_path / "grown") == predictions(tmp_path / "whole")


@pytest.mark.slow
def test_all_tasks_at_once_have_one_fit(tmp_path, monkeypatch):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    overrides = {"method": "joint", "joint.sampling": "equal", "model.variant": "t5-tiny", "train.epochs": 1}
    overrides |= {"train.log_every_steps": 1}
    config = tiny_config(data_dir, **{**overrides, "task_order": "shout,mirror", "optimizer.learning_rate": 0.1})
    scores = continual.run(config, tmp_path / "whole")
    matrix = np.array(scores["matrix"], float)
    assert matrix[0, 0] == matrix[1, 0] and np.isfinite(matrix[1]).all()
    assert scores["summary"]["F.Ra"] == scores["summary"]["BWT"] == 0 and scores["summary"]["AP"] == matrix[1].mean()
    assert scores["costs"]["shout"]["seconds"] == 0 < scores["costs"]["mirror"]["seconds"]
    assert figures(read_scores(tmp_path / "whole"), None)["seconds"] == scores["costs"]["mirror"]["seconds"]
    whole = committed(tmp_path / "whole")
    assert whole.keys() == {"01-mirror"} and len(predictions(tmp_path / "whole")) == 2
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "dev"] == [4]
    again = run_stopped_once(config, tmp_path / "stopped", monkeypatch, checks=1, message="after step 1 of 2 tasks")
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert_same_arrays(committed(tmp_path / "stopped"), whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
