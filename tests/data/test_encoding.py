"""Encoding a split: rows stay rows, cuts are counted, errors name the instance."""

import numpy as np
import pytest

from sapt_jax.data.encoding import Ragged, encode_split
from sapt_jax.data.prompts import encode_answer, encode_prompt, make_prompt
from tests.helpers.data_fakes import WordTokenizer, random_task, rules


@pytest.mark.parametrize("trial", range(4))
def test_ragged_gives_back_its_rows(trial):
    rng = np.random.default_rng([31, trial])
    rows = [rng.integers(0, 99, rng.integers(0, 6)).tolist() for _ in range(rng.integers(0, 9))]
    ragged = Ragged.from_rows(rows)
    assert len(ragged) == len(rows)
    assert [ragged[i].tolist() for i in range(len(rows))] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.ids.dtype == np.int32
    with pytest.raises(IndexError):
        ragged[len(rows)]


@pytest.mark.parametrize("limits", [(30, 4), (200, 20)])
def test_rows_and_counts_match_encoding_one_by_one(limits):
    rng = np.random.default_rng(32)
    tokenizer = WordTokenizer()
    task = random_task(rng, "t")
    own = rules(max_source_length=limits[0], max_target_length=limits[1])
    split = encode_split(
        task.train, definition=task.definition, template="superni", tokenizer=tokenizer, rules=own, seed=0
    )
    sources = [encode_prompt(make_prompt("superni", task.definition, i.input), tokenizer, own) for i in task.train]
    targets = [encode_answer(i.outputs[0], tokenizer, own) for i in task.train]
    assert len(split) == len(task.train)
    for row in range(len(split)):
        assert split.sources[row].tolist() == sources[row][0]
        assert split.targets[row].tolist() == targets[row][0]
    assert split.truncated_sources == sum(cut for _, cut in sources)
    assert split.truncated_targets == sum(cut for _, cut in targets)
    assert (split.truncated_sources > 0) == (limits[0] == 30)
    np.testing.assert_array_equal(split.lengths[:, 0], [len(source) for source, _ in sources])
    np.testing.assert_array_equal(split.lengths[:, 1], [len(target) for target, _ in targets])


def test_errors_name_the_instance():
    task = random_task(np.random.default_rng(33), "t")
    with pytest.raises(ValueError, match=r"instance t-train-\d+: an answer of \d+ tokens"):
        encode_split(
            task.train,
            definition="",
            template="plain",
            tokenizer=WordTokenizer(),
            rules=rules(max_target_length=2, on_long_target="error"),
            seed=0,
        )
