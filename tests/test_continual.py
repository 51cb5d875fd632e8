"""The task sequence end to end on a tiny model: scores, resume, growth, withdrawal, unseen tasks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.config import check_config, protocol_of
from sapt_jax.results.scores import Scores, write_scores
from sapt_jax.storage import checkpoints
from tests.helpers.paths import REPOSITORY
from tests.helpers.run_files import assert_same_arrays, committed, predictions
from tests.helpers.tiny import tiny_config, write_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"))


def test_forward_transfer_compares_a_run_with_a_withdrawn_task_too(tmp_path):
    config = tiny_config(tmp_path, **{"disabled_tasks": "shout", "eval.single_task_runs": str(tmp_path)})
    alone = tiny_config(tmp_path)
    parts = (("shout",), {"shout": "rouge_l"}, np.array([[40.0]]), {}, {}, protocol_of(alone))
    write_scores(tmp_path, Scores("sapt", *parts, alone))
    assert continual._references(config, ("shout",)).single == {"shout": 40.0}
    alone.data.dev_size = 5
    write_scores(tmp_path, Scores("sapt", *parts, alone))
    with pytest.raises(ValueError, match="other settings of data.dev_size"):
        continual._references(config, ("shout",))


def test_forward_transfer_compares_with_a_run_of_every_task_alone(tmp_path):
    """As far as that has come; of a run of several tasks by another method it says nothing."""
    names = ("shout", "mirror", "first")
    config = tiny_config(tmp_path, **{"eval.single_task_runs": str(tmp_path)})
    alone = tiny_config(tmp_path, method="single_task")
    matrix = np.array([[40.0, np.nan, np.nan], [40.0, 50.0, np.nan], [np.nan] * 3])
    parts = (names, dict.fromkeys(names, "rouge_l"), matrix, {}, {}, protocol_of(alone), alone)
    write_scores(tmp_path, Scores("single_task", *parts))
    assert continual._references(config, ("mirror", "shout")).single == {"shout": 40.0, "mirror": 50.0}
    with pytest.raises(ValueError, match="config.eval.single_task_runs has no score of first"):
        continual._references(config, names)
    write_scores(tmp_path, Scores("sequential", *parts))
    with pytest.raises(
        ValueError, match="a run of 3 tasks by sequential; FWT needs one of config.method='single_task'"
    ):
        continual._references(config, names)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A whole run that nothing interrupted: (workdir, scores)."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    overrides = {"train.checkpoint_every_steps": 2, "train.figures": True}
    return workdir, continual.run(tiny_config(data_dir, **overrides), workdir)


def test_a_run_leaves_what_it_promises(finished):
    workdir, scores = finished
    stored = json.loads((workdir / "scores.json").read_text())
    assert stored["task_order"] == ["shout", "mirror", "first"]
    matrix = np.array(stored["matrix"], float)
    assert np.isfinite(matrix[np.tril_indices(3)]).all() and np.isnan(matrix[np.triu_indices(3, 1)]).all()
    np.testing.assert_array_equal(matrix, np.array(scores["matrix"]))
    assert set(stored["summary"]) == {"AP", "F.Ra", "FWT", "BWT", "LA", "IM"}
    np.testing.assert_allclose(stored["seen_averages"], [np.mean(row[: i + 1]) for i, row in enumerate(matrix)])
    assert len(predictions(workdir)) == 6
    rows = [json.loads(line) for line in predictions(workdir)["predictions/02-first/00-shout.jsonl"].splitlines()]
    assert len(rows) == 5
    for row in rows:
        np.testing.assert_allclose(sum(row["attention_weights"]), 1.0, atol=1e-5)
    kinds = {json.loads(line)["kind"] for line in (workdir / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "dev", "scores"}
    (events,) = (workdir / "tensorboard").glob("02-first/*.figures")
    assert b"figures/score_matrix" in events.read_bytes() and b"figures/attention_at_test" in events.read_bytes()


def test_earlier_slots_stay_as_committed(finished):
    arrays = committed(finished[0])
    first, last = arrays["00-shout"], arrays["02-first"]
    for name in first:
        if name.startswith("['bank']"):
            axis = 2 if name.endswith("['a']") else 1
            np.testing.assert_array_equal(np.take(first[name], 0, axis), np.take(last[name], 0, axis))
            assert np.any(np.take(last[name], 2, axis)) and not np.any(np.take(first[name], 2, axis))
    np.testing.assert_array_equal(first["['memory']['keys']"][0], last["['memory']['keys']"][0])
    np.testing.assert_array_equal(first["['memory']['reflection_targets']"][0], [1, 0, 0])
    np.testing.assert_allclose(last["['memory']['reflection_targets']"].sum(axis=1), 1.0, rtol=1e-6)


def test_the_same_command_again_changes_nothing(finished, data_dir):
    workdir, scores = finished
    before = predictions(workdir), committed(workdir), (workdir / "metrics.jsonl").read_text()
    again = continual.run(tiny_config(data_dir, **{"train.checkpoint_every_steps": 2}), workdir)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert [again[name] for name in ("labels", "costs", "routing")] == [
        scores[name] for name in ("labels", "costs", "routing")
    ]
    assert predictions(workdir) == before[0]
    assert_same_arrays(committed(workdir), before[1])
    assert (workdir / "metrics.jsonl").read_text() == before[2]


def start(data_dir, workdir):
    script = (
        "import sys; from sapt_jax import continual; from tests.helpers.tiny import tiny_config; "
        "continual.run(tiny_config(sys.argv[1], **{'train.checkpoint_every_steps': 2}), sys.argv[2])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(data_dir), str(workdir)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process, happened):
    while not happened():
        assert process.poll() is None, f"ended before it was killed: {process.stderr.read()}"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_runs_end_like_the_uninterrupted_one(finished, data_dir, tmp_path):
    """SIGKILL inside the first task, and again between the first two; then to the end."""
    workdir = tmp_path / "killed"
    steps = workdir / "tasks/00-shout/steps"
    kill_when(start(data_dir, workdir), lambda: any(path.name.isdigit() for path in steps.glob("*")))
    assert not (workdir / "tasks/00-shout/committed").exists()
    kill_when(start(data_dir, workdir), (workdir / "tasks/00-shout/committed").exists)
    assert not (workdir / "tasks/01-mirror/committed").exists()
    last = start(data_dir, workdir)
    assert last.wait() == 0, last.stderr.read()
    assert_same_arrays(committed(workdir), committed(finished[0]))
    assert predictions(workdir) == predictions(finished[0])
    assert (workdir / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
    before, after = (json.loads((folder / "scores.json").read_text()) for folder in (finished[0], workdir))
    costs = [scores.pop("costs") for scores in (before, after)]
    assert before == after
    # Of work that a kill undid no time is told; what a call finds finished took what it took then.
    assert all(cost["seconds"] > 0 and cost["peak_bytes"] > 1e7 for run in costs for cost in run.values())
    stored = [json.loads(file.read_text()) for file in sorted(workdir.glob("tasks/*/costs.json"))]
    assert list(costs[1].values()) == stored


def test_a_finished_run_takes_more_tasks(finished, data_dir, tmp_path):
    workdir = tmp_path / "grown"
    short = tiny_config(data_dir, task_order="shout,mirror")
    continual.run(short, workdir)
    before = committed(workdir)
    continual.run(tiny_config(data_dir), workdir)
    after = committed(workdir)
    assert after.keys() == {"00-shout", "01-mirror", "02-first"}
    assert_same_arrays(before, {name: after[name] for name in before})
    old, new = before["01-mirror"], after["02-first"]
    assert old["['memory']['keys']"].shape[0] == 2 and new["['memory']['keys']"].shape[0] == 3
    np.testing.assert_array_equal(old["['memory']['keys']"], new["['memory']['keys']"][:2])
    for name in old:
        if name.startswith("['bank']"):
            axis = 2 if name.endswith("['a']") else 1
            np.testing.assert_array_equal(old[name], np.take(new[name], [0, 1], axis))
    with pytest.raises(ValueError, match="config.task_order has first there"):
        continual.run(tiny_config(data_dir, task_order="first,shout"), workdir)


def test_prompts_share_the_loop(data_dir, tmp_path):
    overrides = {"pet.kind": "prompt", "pet.prompt_length": 5, "train.epochs": 1, "task_order": "shout,mirror"}
    scores = continual.run(tiny_config(data_dir, **overrides), tmp_path)
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    # Buckets count the source's own tokens; with the prompt they are multiples.
    assert all((source + 5) % 16 == 0 for source, _ in scores["buckets"])
    first, last = committed(tmp_path).values()
    name = "['bank']['prompt']"
    assert first[name].shape == (2, 5, 32)
    np.testing.assert_array_equal(first[name][0], last[name][0])
    assert np.any(last[name][1]) and not np.any(first[name][1])


def test_a_withdrawn_task_takes_no_part(finished, data_dir):
    workdir, _ = finished
    before = predictions(workdir)
    config = tiny_config(data_dir, disabled_tasks="mirror", **{"train.checkpoint_every_steps": 2})
    scores = continual.run(config, workdir)
    assert scores["protocol"]["disabled_tasks"] == "mirror"
    beside = predictions(workdir / "without-mirror")
    rows = [json.loads(line) for line in beside["predictions/02-first/02-first.jsonl"].splitlines()]
    for row in rows:
        assert row["attention_weights"][1] == 0
        np.testing.assert_allclose(sum(row["attention_weights"]), 1.0, atol=1e-5)
    assert predictions(workdir) == before
    overrides = {"train.checkpoint_every_steps": 2, "disabled_tasks": "nobody"}
    with pytest.raises(ValueError, match="config.disabled_tasks names nobody"):
        continual.run(tiny_config(data_dir, **overrides), workdir)


def test_a_score_says_what_was_told_seen_and_kept(finished):
    """Counted by hand: SAPT on a LLaMA of width 32 with two layers, and the bank that its checkpoint holds."""
    workdir, scores = finished
    labels = scores["labels"]
    assert [labels[name] for name in ("needs_task_id", "routing", "old_data")] == [False, "method", "real"]
    # The last task saw the pools of the two before it: at least four rows each, of 16 for training.
    assert labels["rows"] == 2 * 4
    arrays = committed(workdir)["02-first"]
    kept = [x for name, x in arrays.items() if name.startswith(("['bank']", "['memory']", "['trainable'].selector"))]
    assert labels["parameters"] == sum(x.size for x in kept)
    tokens = (labels["bytes"] - sum(x.nbytes for x in kept)) / 4
    assert tokens == int(tokens) and 8 * 5 < tokens < 8 * (48 + 16)


def test_routing_is_read_off_the_weights_of_the_tests(finished):
    workdir, scores = finished
    own = {}
    for slot, name in enumerate(("shout", "mirror", "first")):
        lines = (workdir / f"predictions/02-first/{slot:02d}-{name}.jsonl").read_text().splitlines()
        own[name] = [int(np.argmax(json.loads(line)["attention_weights"]) == slot) for line in lines]
    assert scores["routing"]["by_task"] == {name: np.mean(rows) for name, rows in own.items()}
    np.testing.assert_allclose(scores["routing"]["accuracy"], np.mean(sum(own.values(), [])))


def test_intransigence_compares_with_one_run_of_all_tasks(tmp_path):
    names = ("shout", "mirror")
    config = tiny_config(tmp_path, **{"eval.joint_run": str(tmp_path)})
    together = tiny_config(tmp_path, method="sequential")
    parts = (names, dict.fromkeys(names, "rouge_l"), np.array([[40.0, np.nan], [30.0, 50.0]]), {}, {})
    write_scores(tmp_path, Scores("joint", *parts, protocol_of(together), together))
    references = continual._references(config, names)
    assert (references.single, references.joint) == ({}, {"shout": 30.0, "mirror": 50.0})
    with pytest.raises(ValueError, match="config.eval.joint_run has no score of first"):
        continual._references(config, (*names, "first"))
    write_scores(tmp_path, Scores("sequential", *parts, protocol_of(together), together))
    with pytest.raises(ValueError, match="a run of sequential; intransigence needs one of config.method='joint'"):
        continual._references(config, names)


def test_an_oracle_puts_all_weight_on_the_tasks_own_block(finished, data_dir):
    workdir, scores = finished
    before = predictions(workdir)
    config = tiny_config(data_dir, **{"train.checkpoint_every_steps": 2, "eval.routing": "oracle"})
    told = continual.run(config, workdir)
    assert told["protocol"]["eval.routing"] == told["labels"]["routing"] == "oracle" and told["routing"] is None
    for name, text in predictions(workdir / "oracle").items():
        slot = int(name.split("/")[2].split("-")[0])
        rows = [json.loads(line)["attention_weights"] for line in text.splitlines()]
        assert rows == [np.eye(3)[slot].tolist()] * 5
    assert predictions(workdir) == before
    assert json.loads((workdir / "scores.json").read_text())["labels"] == scores["labels"]
    for method in ("sequential", "l2p", "single_task"):
        with pytest.raises(ValueError, match="config.eval.routing='oracle': config.method='.*' does not choose among"):
            kind = {"pet.kind": "prompt"} if method == "l2p" else {}
            check_config(tiny_config(data_dir, method=method, **{"eval.routing": "oracle", **kind}))
    with pytest.raises(ValueError, match="config.eval.unseen_tasks: config.eval.routing='oracle' is told"):
        check_config(tiny_config(data_dir, **{"eval.routing": "oracle", "eval.unseen_tasks": "extra"}))


def test_unseen_tasks_are_tested_after_the_last(finished, data_dir):
    workdir, scores = finished
    folder = data_dir / "CL_Benchmark_unseen" / "extra"
    folder.mkdir(parents=True)
    instances = [{"input": "abc", "output": ["cba", "abc"]}, {"input": "dd", "output": "dd"}]
    (folder / "test.json").write_text(json.dumps({"Definition": ["mirror it."], "Instances": instances}))
    overrides = {"train.checkpoint_every_steps": 2, "eval.unseen_tasks": "extra"}
    again = continual.run(tiny_config(data_dir, **overrides), workdir)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert list(again["unseen"]) == ["extra"] and np.isfinite(again["unseen"]["extra"])
    rows = predictions(workdir)["predictions/02-first/03-extra.jsonl"].splitlines()
    assert [json.loads(row)["references"] for row in rows] == [["cba", "abc"], ["dd"]]


def test_general_ability_is_the_loss_on_a_text(finished, data_dir, tmp_path, monkeypatch):
    """Against a loop over rows without padding, in float64, on the model's own logits."""
    text, trees = tmp_path / "text.txt", []
    text.write_text("".join(np.random.default_rng(0).choice(list("abc. "), 600)))
    measure = continual.general_loss
    monkeypatch.setattr(continual, "general_loss", lambda *parts: trees.append(parts) or measure(*parts))
    config = tiny_config(data_dir, **{"train.checkpoint_every_steps": 2, "eval.general": str(text)})
    told = continual.run(config, finished[0])["general"]
    assert told["lost"] == told["after"] - told["before"] != 0
    for (run, (frozen, trainable), task), name in zip(trees, ("before", "after"), strict=True):
        passages, losses = run.stream.general, []
        assert len(passages) == 600 // (48 + 16)
        for row in range(len(passages)):
            source, target = (jnp.asarray(part[row])[None] for part in (passages.sources, passages.targets))
            masks, mixture = (source >= 0, target >= 0), None
            if trainable is not None:
                pooled = np.asarray(frozen.base["token_embedder"]["embedding"])[np.asarray(source[0])].max(axis=0)
                weights = run.method.weights(frozen, trainable, jnp.asarray(pooled)[None], task, training=False)
                mixture = run.method.mixture(frozen, trainable, weights, task)
            logits = run.model.apply({"params": frozen.base}, source, masks[0], target, masks[1], mixture)[0]
            logits = np.asarray(logits, np.float64)
            picked = logits[np.arange(16), np.asarray(target[0])]
            losses.append(np.log(np.exp(logits).sum(axis=-1)) - picked)
        np.testing.assert_allclose(told[name], np.mean(losses), rtol=1e-5)


def test_what_tasks_learn_in_one_block_cannot_be_withdrawn_however_far_they_are(data_dir, tmp_path):
    for method in ("sequential", "joint"):
        with pytest.raises(ValueError, match="tasks share a block"):
            continual.run(tiny_config(data_dir, method=method, disabled_tasks="shout"), tmp_path / method)


def test_sequential_lora_shares_the_loop_and_its_scores_serve_forward_transfer(data_dir, tmp_path):
    scores = continual.run(tiny_config(data_dir, method="sequential", task_order="shout,mirror"), tmp_path / "both")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    assert scores["summary"]["FWT"] is None
    bank = {name: x for name, x in committed(tmp_path / "both")["01-mirror"].items() if name.startswith("['bank']")}
    assert all(x.shape[2 if name.endswith("['a']") else 1] == 1 for name, x in bank.items())
    with pytest.raises(ValueError, match="tasks share a block"):
        config = tiny_config(data_dir, method="sequential", task_order="shout,mirror", disabled_tasks="shout")
        continual.run(config, tmp_path / "both")

    for name in ("shout", "mirror"):
        continual.run(tiny_config(data_dir, method="sequential", task_order=name), tmp_path / name)
    overrides = {"eval.single_task_runs": f"{tmp_path / 'shout'},{tmp_path / 'mirror'}"}
    config = tiny_config(data_dir, method="sequential", task_order="shout,mirror", **overrides)
    again = continual.run(config, tmp_path / "both")
    alone = [json.loads((tmp_path / name / "scores.json").read_text())["matrix"][0][0] for name in ("shout", "mirror")]
    np.testing.assert_allclose(again["summary"]["FWT"], np.mean(np.diag(scores["matrix"]) - alone), atol=1e-9)
    config.eval.single_task_runs = str(tmp_path / "shout")
    with pytest.raises(ValueError, match="config.eval.single_task_runs has no score of mirror"):
        continual.run(config, tmp_path / "both")


def all_but_events(workdir):
    """What a workdir holds; TensorBoard's files are made anew from the curves whenever a run opens."""
    files = [path for path in workdir.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {path: path.read_bytes() for path in files}


def test_a_test_set_that_was_mended_is_told_before_anything_changes(finished, data_dir, tmp_path):
    workdir, mended = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished[0], workdir)
    shutil.copytree(data_dir, mended)
    file = mended / "mirror" / "test.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows[:-1], json.dumps({"input": "other", "output": "rehto"})]) + "\n")
    before = all_but_events(workdir)
    config = tiny_config(mended, **{"train.checkpoint_every_steps": 2, "task_order": "shout,mirror,first,last"})
    write_tasks(tmp_path / "more", ("last",))
    shutil.copytree(tmp_path / "more" / "last", mended / "last")
    with pytest.raises(ValueError, match=r"01-mirror.jsonl: the rows of the test set have changed .* from row 5 on"):
        continual.run(config, workdir)
    assert all_but_events(workdir) == before


@pytest.mark.slow
def test_a_damaged_task_is_named_and_learned_again_once_it_is_deleted(finished, data_dir, tmp_path):
    workdir = tmp_path / "[run]*"
    shutil.copytree(finished[0], workdir)
    folder = workdir / "tasks" / "00-shout" / "committed"
    shutil.rmtree(folder / "d")
    for name in ("tasks/my-notes", "tensorboard/old-run"):
        (workdir / name).mkdir()
    config = tiny_config(data_dir, **{"train.checkpoint_every_steps": 2})
    with pytest.raises(checkpoints.DamagedError, match="00-shout/committed lacks a part"):
        continual.run(config, workdir)
    shutil.rmtree(folder)
    continual.run(config, workdir)
    shutil.move(workdir, tmp_path / "plain")
    assert_same_arrays(committed(tmp_path / "plain"), committed(finished[0]))
    assert predictions(tmp_path / "plain") == predictions(finished[0])
    assert (tmp_path / "plain" / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()
