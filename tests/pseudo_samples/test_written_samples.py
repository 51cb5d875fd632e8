"""What a writer learns, what of its texts is kept, and how a pool is described and stored."""

import dataclasses

import numpy as np
import pytest

from sapt_jax.data.encoding import encode_texts
from sapt_jax.data.prompts import CUE, Writing, write_sample
from sapt_jax.data.pseudo_samples import PseudoSamples, read_pseudo_samples
from sapt_jax.data.task import Instance, Task
from sapt_jax.pseudo_samples import written_samples
from sapt_jax.pseudo_samples.written_samples import Collection, Sample, read_sample
from tests.helpers.data_fakes import WordTokenizer, random_task, rules

INSTANCE = Instance("x-1", "the  cat sat", ("on a mat", "down"))


@pytest.mark.parametrize("answers", [False, True])
def test_a_learned_text_reads_back(answers):
    text = write_sample(" Say where. ", INSTANCE, answers)
    assert text == "Say where.__inp__the  cat sat" + "__ans__on a mat" * answers
    assert read_sample(text, answers) == Sample("Say where.", "the  cat sat", "on a mat" * answers)


@pytest.mark.parametrize(
    ("text", "answers", "reason"),
    [
        ("Say where. the cat", False, "no input mark"),
        ("Say where.__inp__  \n", False, "empty input"),
        ("Say__ans__here.__inp__cat", False, "answer before input"),
        ("Say where.__inp__cat", True, "no answer"),
        ("Say where.__inp__cat__ans__ ", True, "no answer"),
    ],
)
def test_texts_without_a_sample(text, answers, reason):
    assert read_sample(text, answers) == reason


def test_an_answer_that_nobody_asked_for_is_cut_off():
    assert read_sample("Do.__inp__cat__ans__dog", False) == Sample("Do.", "cat", "")


def test_a_second_input_mark_ends_the_sample():
    assert read_sample("Do.__inp__cat__inp__dog", False) == Sample("Do.", "cat", "")
    assert read_sample("Do.__inp__cat__ans__dog__inp__cow", True) == Sample("Do.", "cat", "dog")
    assert read_sample("Do.__inp__cat__inp__cow__ans__dog", True) == "no answer"


def test_the_writer_learns_every_training_input_after_one_cue():
    task = random_task(np.random.default_rng(1), "t", sizes=(7, 2, 2))
    tokenizer = WordTokenizer()
    split = encode_texts(task.train, task.definition, tokenizer, rules(writing=Writing(CUE, False, 200)))
    assert len(split) == 7 and split.truncated_targets == 0
    assert len({tuple(split.sources[i]) for i in range(7)}) == 1
    for i, instance in enumerate(task.train):
        ids = split.targets[i].tolist()
        assert ids[-1] == tokenizer.eos_id
        assert ids[:-1] == tokenizer.encode(write_sample(task.definition, instance, False))


def test_a_long_text_has_no_end():
    task = random_task(np.random.default_rng(2), "t", sizes=(3, 1, 1))
    task = dataclasses.replace(task, train=(Instance("long", "word " * 50, ("x",)),))
    tokenizer = WordTokenizer()
    split = encode_texts(task.train, task.definition, tokenizer, rules(writing=Writing(CUE, False, 20)))
    assert split.truncated_targets == 1 and len(split.targets[0]) == 20
    assert tokenizer.eos_id not in split.targets[0]


def test_a_collection_counts_what_it_leaves_out_and_stops_when_full():
    collection = Collection(wanted=2)
    for item in ("no end", Sample("D", "a", ""), Sample("E", "a", ""), "no end", Sample("D", "b", ""), "too long"):
        collection.add(item)
    assert collection.full
    assert [sample.input for sample in collection.samples] == ["a", "b"]
    assert collection.rejected == {"no end": 2, "repeated": 1}


def test_a_pool_has_the_most_frequent_definition_and_reads_back(tmp_path):
    collection = Collection(wanted=3)
    for number, definition in enumerate(("Dr it.", "Do it.", "Do it.")):
        collection.add(Sample(definition, f"input {number}\n«ü»", "yes"))
    pool = collection.pool("t")
    assert pool.definition == "Do it."
    file = written_samples.pool_file(tmp_path, "SuperNI", "t")
    file.parent.mkdir(parents=True)
    file.write_text(written_samples.pool_json(pool), encoding="utf-8")
    assert read_pseudo_samples(file.parent.parent, "t") == pool
    empty = Collection(wanted=1).pool("t")
    assert empty == PseudoSamples("", ())
    file.write_text(written_samples.pool_json(empty), encoding="utf-8")
    assert read_pseudo_samples(file.parent.parent, "t", may_be_empty=True) == empty


def test_distinct_shares_and_copies_are_counted_by_hand():
    assert written_samples.distinct_share(["a b a", "b"], 1) == 2 / 4
    assert written_samples.distinct_share(["a b a", "b"], 2) == 1.0
    assert written_samples.distinct_share(["a b a b"], 2) == 2 / 3
    assert written_samples.distinct_share([], 1) == 0.0
    real = tuple(Instance(str(i), text, ("",)) for i, text in enumerate(("a b", "c d e f", "g h", "i j")))
    task = Task("t", "Do it.", real, (), ())
    pool = PseudoSamples("Do  it.", (Instance("w", "a  b", ("",)), Instance("v", "a b c", ("",))))
    found = written_samples.describe_pool(pool, task)
    assert found["copies"] == 0.5 and found["definition_kept"] == 1.0
    assert found["words"] == 2.5 and found["real_words"] == 2.5
    assert found["distinct_1"] == 3 / 5 and found["distinct_2"] == 2 / 3
    assert found["real_distinct_1"] == 1.0
