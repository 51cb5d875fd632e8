"""Workdirs that are URLs: a whole run through file://, and text files in an object store made of memory."""

import json
import logging

import fsspec
import numpy as np
import pytest
from etils.epath import backend as epath_backend
from etils.epath import gpath

from sapt_jax import continual
from sapt_jax.results.curves import RunLog
from sapt_jax.results.scores import Scores, read_scores, write_scores
from sapt_jax.storage import checkpoints, task_folders
from sapt_jax.storage.paths import as_path, is_remote
from tests.helpers.run_files import assert_same_arrays, committed, predictions
from tests.helpers.tiny import tiny_config, write_tasks


def test_urls_become_paths(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert as_path(tmp_path) == as_path(str(tmp_path)) == as_path(f"file://{tmp_path}")
    assert str(as_path("file:///a%20b/c") / "d") == "/a b/c/d"
    assert [str(as_path(f"{scheme}://bucket/run") / "tasks") for scheme in ("gs", "s3")] == [
        "gs://bucket/run/tasks",
        "s3://bucket/run/tasks",
    ]
    assert as_path(as_path("gs://bucket/run")) == as_path("gs://bucket/run")
    assert is_remote("gs://bucket/run") and is_remote(as_path("s3://bucket/run"))
    assert not is_remote(tmp_path) and not is_remote("gs:/bucket") and not is_remote(as_path(f"file://{tmp_path}"))


def test_urls_that_cannot_be_are_told(monkeypatch):
    with pytest.raises(
        ValueError, match="ftp://host/run: choose a local folder, or a path of file:///, gs:// or s3://"
    ):
        as_path("ftp://host/run")
    with pytest.raises(ValueError, match="file://run: a file URL names no host"):
        as_path("file://run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="gs://bucket/run needs the package gcsfs: pip install gcsfs"):
        as_path("gs://bucket/run")


@pytest.mark.slow
def test_a_run_in_a_url_is_the_run_in_its_folder(tmp_path):
    """Every file of it, generated pseudo-samples included; and the folder's name goes on with what the URL began."""
    data_dir = write_tasks(tmp_path / "data", ("shout", "mirror"))
    overrides = {
        "pseudo_samples.source": "generate",
        "pseudo_samples.writer.steps": 2,
        "pseudo_samples.writer.batch_size": 4,
        "pseudo_samples.writer.max_length": 32,
        "pseudo_samples.writer.draws": 1,
        "train.epochs": 1,
    }
    workdir = tmp_path / "a run"
    assert workdir.as_uri().endswith("/a%20run")
    begun = continual.run(tiny_config(data_dir, task_order="shout", **overrides), workdir.as_uri())
    before = committed(workdir)
    assert before.keys() == {"00-shout"} and len(predictions(workdir)) == 1
    scores = continual.run(tiny_config(data_dir, task_order="shout,mirror", **overrides), workdir)
    assert scores["matrix"][0][0] == begun["matrix"][0][0] and np.isfinite(scores["matrix"][1]).all()
    assert_same_arrays(before, {"00-shout": committed(workdir)["00-shout"]})
    assert list(workdir.glob("tasks/00-shout/generated_data/**/shout/train.json"))
    assert list(workdir.glob("tensorboard/*/events*"))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "a run"}


class InMemory(epath_backend._FileSystemSpecBackend):
    """epath's own way to object stores, over fsspec's store in memory."""

    def fs(self, path):
        return fsspec.filesystem("memory")


def test_text_files_in_an_object_store(monkeypatch, caplog):
    """Nothing is appended or renamed there: curves are written as a whole, before every checkpoint and at the end."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", InMemory())
    workdir = as_path("gs://bucket/run")

    def steps():
        return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    with caplog.at_level(logging.WARNING), RunLog(workdir, stand=None) as log:
        for step in (1, 2):
            log.log("train", task_index=0, task="shout", step=step, loss=0.5)
        assert steps() == []
        log.flush()
        assert steps() == [1, 2]
        log.log("train", task_index=0, task="shout", step=3, loss=0.5)
    assert steps() == [1, 2, 3]
    assert "gs://bucket/run: no TensorBoard events in an object store" in caplog.text
    with RunLog(workdir, stand=[("shout", 2)]) as log:
        log.log("train", task_index=0, task="shout", step=4, loss=0.5)
    assert steps() == [1, 2, 4]

    file = write_scores(
        workdir,
        Scores(
            method="sapt",
            task_order=("shout",),
            metric_per_task={"shout": "exact_match"},
            matrix=np.array([[25.0]]),
            summary={"AP": 25.0},
            seeds={"seed": 0},
            protocol={},
            config={},
        ),
    )
    assert str(file) == "gs://bucket/run/scores.json"
    assert read_scores("gs://bucket/run")["matrix"].tolist() == [[25.0]]


def test_a_checkpoint_in_an_object_store_counts_when_it_is_closed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", InMemory())
    folder = task_folders.task_folder("gs://bucket/half", 0, "shout")
    (folder / "committed" / "manifest").write_text("")
    assert not checkpoints.has_committed(folder)
    (folder / "committed" / "commit_success.txt").write_text("")
    assert checkpoints.has_committed(folder)
