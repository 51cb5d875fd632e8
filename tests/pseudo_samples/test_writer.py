"""A run that writes its own pseudo-samples: what it stores, that it is reused, and that nothing else changes."""

import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.data.pseudo_samples import read_pseudo_samples
from sapt_jax.programs import optimizer_of
from sapt_jax.pseudo_samples import writer
from sapt_jax.state import Trainable
from tests.helpers.run_files import assert_same_arrays, committed
from tests.helpers.tiny import tiny_config, write_tasks

pytestmark = pytest.mark.slow

POOL = "tasks/00-shout/generated_data/shout/train.json"
SETTINGS = {
    "task_order": "shout,mirror",
    "train.epochs": 1,
    "pseudo_samples.source": "generate",
    "pseudo_samples.minimum": 3,
    "pseudo_samples.writer.rank": 16,
    "pseudo_samples.writer.learning_rate": 3e-2,
    "pseudo_samples.writer.steps": 160,
    "pseudo_samples.writer.batch_size": 8,
    "pseudo_samples.writer.max_length": 40,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("data"), tasks=("shout", "mirror"))


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "generated"
    continual.run(tiny_config(data_dir, **SETTINGS), workdir)
    return workdir


def test_the_pool_lies_under_its_task_and_is_described(finished):
    pool = read_pseudo_samples((finished / POOL).parent.parent, "shout")
    assert pool.definition == "shout it."
    inputs = [instance.input for instance in pool.instances]
    assert len(inputs) == len(set(inputs)) == 3 and all(text.strip() for text in inputs)
    # The model learned the task's alphabet; bytes of a text drawn at random would seldom be of it.
    letters = "".join(inputs)
    assert sum(letter in "abcd" for letter in letters) > len(letters) / 2
    quality = json.loads((finished / POOL).with_name("quality.json").read_text())
    assert quality["definition_kept"] == 1.0 and quality["wanted"] == 3
    assert 0 <= quality["copies"] <= 1 and quality["attention_kl"] == 0.0
    # A longer order would need one of the last task too; this one does not.
    assert not (finished / "tasks/01-mirror/generated_data").exists()
    kinds = {json.loads(line)["kind"] for line in (finished / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "dev", "scores", "writer", "pseudo_samples"}


def test_the_pool_is_reused_and_written_again_alike(finished, data_dir, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    before = (workdir / POOL).read_text()
    edited = before.replace("shout it.", "Shout it!")
    (workdir / POOL).write_text(edited)
    continual.run(tiny_config(data_dir, **SETTINGS), workdir)
    assert (workdir / POOL).read_text() == edited
    (workdir / POOL).unlink()
    continual.run(tiny_config(data_dir, **SETTINGS), workdir)
    assert (workdir / POOL).read_text() == before
    assert_same_arrays(committed(workdir), committed(finished))
    assert (workdir / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_a_run_on_the_same_pool_as_files_learns_the_same(finished, data_dir, tmp_path):
    """So the writer leaves no trace in what the run learns."""
    # The last task's pool is read, and never used.
    for name in ("shout", "mirror"):
        shutil.copytree((finished / POOL).parent, tmp_path / "pools" / name)
    settings = {**SETTINGS, "pseudo_samples.source": "files", "pseudo_samples.dir": str(tmp_path / "pools")}
    continual.run(tiny_config(data_dir, **settings), tmp_path / "files")
    assert_same_arrays(committed(tmp_path / "files"), committed(finished))


def test_too_few_samples_are_told_and_the_run_goes_on(data_dir, tmp_path, caplog):
    settings = {**SETTINGS, "pseudo_samples.writer.steps": 1, "pseudo_samples.writer.max_length": 4}
    with caplog.at_level(logging.WARNING, logger="sapt_jax.pseudo_samples.writer"):
        scores = continual.run(tiny_config(data_dir, **settings), tmp_path / "run")
    assert np.isfinite(np.array(scores["matrix"], float)[1]).all()
    (message,) = [record.getMessage() for record in caplog.records if "samples wanted" in record.message]
    assert message.startswith("shout: the writer wrote 0 of 3 samples wanted in 64 texts")
    assert "no end 64" in message
    # A later call finds the empty pool, and goes on with it.
    again = continual.run(tiny_config(data_dir, **settings), tmp_path / "run")
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])


def test_the_rates_of_the_run_are_not_the_writer_s(data_dir):
    rates = (("slot/prompt", 1.0), ("selector/.*", None))
    config = writer._writer_config(
        tiny_config(data_dir, **{**SETTINGS, "pet.kind": "prompt", "optimizer.rates": rates})
    )
    block = Trainable({"decoder": {"a": jnp.ones((2, 3))}}, {})
    optimizer = optimizer_of(config)
    updates, _ = optimizer.update(block, optimizer.init(block), block)
    assert np.abs(updates.slot["decoder"]["a"]).min() > 0


def test_a_method_that_needs_no_samples_writes_none(data_dir, tmp_path):
    continual.run(tiny_config(data_dir, **SETTINGS, method="sequential"), tmp_path)
    assert not list(tmp_path.glob("tasks/*/writer"))
