"""Pseudo-samples: read from files, or sampled from train, and encoded as real data is."""

import json

import numpy as np
import pytest

from sapt_jax.data.encoding import encode_split
from sapt_jax.data.pseudo_samples import (
    PoolOrigin,
    encode_pseudo_samples,
    find_pseudo_dir,
    load_pseudo_samples,
    read_pseudo_samples,
)
from tests.helpers.data_fakes import WordTokenizer, random_task, rules


def write_pool(folder, name, inputs, definition=("Do  it .",)):
    (folder / name).mkdir(parents=True)
    rows = [{"input": text, "output": ""} for text in inputs]
    (folder / name / "train.json").write_text(json.dumps({"Definition": list(definition), "Instances": rows}))


def load(task, **changes):
    base = dict(source="train", folder=None, share=0.02, minimum=3, seed=0)
    return load_pseudo_samples(task, PoolOrigin(**{**base, **changes}))


def test_files_carry_their_generated_definition_and_empty_outputs(tmp_path):
    task = random_task(np.random.default_rng(41), "t")
    write_pool(tmp_path, "t", ["one", "two words"])
    pool = load(task, source="files", folder=tmp_path)
    assert pool.definition == "Do  it ."
    assert [instance.input for instance in pool.instances] == ["one", "two words"]
    tokenizer = WordTokenizer()
    encoded = encode_pseudo_samples(pool, template="superni", tokenizer=tokenizer, rules=rules())
    as_data = encode_split(
        pool.instances, definition="Do  it .", template="superni", tokenizer=tokenizer, rules=rules(seed=5)
    )
    np.testing.assert_array_equal(encoded.sources.ids, as_data.sources.ids)
    # The end token of the empty answer may be pooled too.
    longer = encode_pseudo_samples(
        pool, template="superni", tokenizer=tokenizer, rules=rules(), with_answers=True
    ).sources
    for row in range(2):
        assert longer[row].tolist() == [*encoded.sources[row], tokenizer.eos_id]
    assert [encoded.targets[i].tolist() for i in range(2)] == [[tokenizer.eos_id]] * 2


@pytest.mark.parametrize("size, expected", [(2, 2), (20, 3), (150, 3), (400, 8)])
def test_train_samples_a_share_with_a_minimum(size, expected):
    task = random_task(np.random.default_rng(42), "t", sizes=(size, 1, 1))
    pool = load(task)
    assert len(pool.instances) == len({instance.id for instance in pool.instances}) == expected
    assert set(pool.instances) <= set(task.train)
    assert pool == load(task)
    if expected == 8:
        assert pool != load(task, seed=1)


def test_none_and_errors(tmp_path):
    task = random_task(np.random.default_rng(43), "t")
    assert load(task, source="none") is None
    assert load(task, source="generate") is None
    with pytest.raises(ValueError, match="pseudo_samples.source must be one of"):
        load(task, source="elsewhere")
    with pytest.raises(ValueError, match="set config.pseudo_samples.dir"):
        load(task, source="files")
    with pytest.raises(FileNotFoundError, match="t/train.json: there are no pseudo-samples of t"):
        load(task, source="files", folder=tmp_path)
    write_pool(tmp_path, "t", [])
    with pytest.raises(ValueError, match="holds no instances"):
        read_pseudo_samples(tmp_path, "t")


def test_the_folder_is_found_as_it_is_or_under_generated_data(tmp_path):
    inside = tmp_path / "generated_data" / "pool"
    inside.mkdir(parents=True)
    assert find_pseudo_dir("pool", tmp_path) == inside
    assert find_pseudo_dir(str(inside), tmp_path / "elsewhere") == inside
    with pytest.raises(FileNotFoundError, match="looked for other and"):
        find_pseudo_dir("other", tmp_path)
