"""TFDS: the benchmarks prepared and read back, and public datasets read from fakes, all without TensorFlow."""

import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sapt_jax.data.benchmarks import Origin, load_task
from sapt_jax.data.sources.tfds_builders import prepare
from sapt_jax.data.sources.tfds_public import PUBLIC_TASKS
from tests.helpers.data_fakes import cuts


def load(name, root, benchmark="long_sequence", source="tfds_public", **changes):
    return load_task(name, Origin(benchmark, source, str(root)), cuts(**changes))


def write_benchmark(root, folder, name, train, test):
    task = root / "CL_Benchmark" / folder / name
    task.mkdir(parents=True)
    for split, rows in (("train", train), ("test", test)):
        data = {"Definition": ["Do é."], "Instances": rows}
        (task / f"{split}.json").write_text(json.dumps(data), encoding="utf-8")
    (task / "labels.json").write_text('["a", "b"]')


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark, folder, name",
    [("superni", "SuperNI", "task1572_samsum_summary"), ("long_sequence", "Long_Sequence", "cb")],
)
def test_a_prepared_task_equals_its_source(tmp_path, benchmark, folder, name):
    train = [{"input": f"in é\n{i}", "output": ["x", "y"] if i % 3 else f"z{i}"} for i in range(11)]
    test = [{"input": "t", "output": "u", "id": "my-id"}]
    write_benchmark(tmp_path, folder, name, train, test)
    with pytest.raises(FileNotFoundError, match="no prepared dataset there. Prepare it with"):
        load(name, tmp_path, benchmark, "tfds")
    for _ in range(2):
        assert prepare(folder, name, source_dir=tmp_path, tfds_dir=tmp_path / "tfds") == {"train": 11, "test": 1}
    assert load(name, tmp_path, benchmark, "tfds") == load(name, tmp_path, benchmark, "cl_benchmark")
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="unknown task"):
        load("other", tmp_path, benchmark, "tfds")


def test_faulty_rows_are_prepared_and_left_to_the_runs_setting(tmp_path):
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": ""}]
    write_benchmark(tmp_path, "Long_Sequence", "cb", rows, rows[:1])
    prepare("Long_Sequence", "cb", source_dir=tmp_path, tfds_dir=tmp_path / "tfds")
    with pytest.raises(ValueError, match="train row 1 has an empty output"):
        load("cb", tmp_path, source="tfds")
    assert len(load("cb", tmp_path, source="tfds", on_bad_instance="skip").train) == 1


ENTAILMENT = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
TRUTH = {"False": "False", "True": "True"}
SENTENCES = ({"premise": "P", "hypothesis": "H"}, "sentence 1: P\nsentence 2: H")
# Of every public dataset: its name and test split in TFDS, the answer for each of its labels, a row with its features
# as TFDS declares them, and the text that the row has to become.
PUBLIC = {
    "mnli": ("glue/mnli", "validation_matched", ENTAILMENT, *SENTENCES),
    "cb": ("super_glue/cb", "validation", ENTAILMENT, *SENTENCES),
    "rte": (
        *("super_glue/rte", "validation", {"entailment": "entailment", "not_entailment": "contradiction"}),
        *SENTENCES,
    ),
    "wic": (
        *("super_glue/wic", "validation", TRUTH),
        *({"word": "W", "sentence1": "S", "sentence2": "T"}, "word: W\nS\nT"),
    ),
    "copa": (
        *("super_glue/copa", "validation", {"choice1": "A", "choice2": "B"}),
        {"premise": "P", "question": "cause", "choice1": "C", "choice2": "D"},
        'Which sentence is the cause of "P"? Choose one between A and B.\nA: C\nB: D',
    ),
    "qqp": (
        *("glue/qqp", "validation", {"not_duplicate": "no", "duplicate": "yes"}),
        *({"question1": "Q", "question2": "R"}, "first sentence: Q\nsecond sentence: R"),
    ),
    "boolq": (
        *("super_glue/boolq", "validation", TRUTH),
        *({"question": "Q", "passage": "P"}, "question: Q\npassage: P"),
    ),
    "multirc": (
        *("super_glue/multirc", "validation", TRUTH),
        {"paragraph": "P", "question": "Q", "answer": "A"},
        "paragraph: P\nquestion: Q\ncandidate answer: A",
    ),
    "imdb": ("imdb_reviews/plain_text", "test", {"neg": "Bad", "pos": "Good"}, {"text": "T"}, "T"),
    "sst2": ("glue/sst2", "validation", {"negative": "Bad", "positive": "Good"}, {"sentence": "S "}, "Text: S "),
    "agnews": (
        *("ag_news_subset", "test"),
        {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Science or Technology"},
        *({"title": "T", "description": "D"}, "Title: T\nText: D\n"),
    ),
}


def write_fake(root, dataset, labels, splits, file_format="array_record"):
    """Prepares a dataset of the given name and rows; rows are (texts, label index)."""
    name, _, config = dataset.partition("/")
    texts = next(iter(splits.values()))[0][0]
    features = {key: tfds.features.Text() for key in texts}
    features |= {"label": tfds.features.ClassLabel(names=labels), "idx": tfds.features.Scalar(np.int32)}
    examples = {
        split: [(i, {**row, "label": label, "idx": i}) for i, (row, label) in enumerate(rows)]
        for split, rows in splits.items()
    }
    members = dict(
        name=name,
        VERSION=tfds.core.Version("1.0.3"),
        BUILDER_CONFIGS=[tfds.core.BuilderConfig(name=config)] if config else [],
        _info=lambda self: tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features)),
        _split_generators=lambda self, dl_manager: {split: iter(rows) for split, rows in examples.items()},
        _generate_examples=None,
    )
    builder = type("Fake", (tfds.core.GeneratorBasedBuilder,), members, skip_registration=True)
    builder(config=config or None, data_dir=str(root), file_format=file_format).download_and_prepare()


def test_the_public_datasets_are_these():
    assert PUBLIC_TASKS.keys() == PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_rows_take_the_form_of_the_benchmark(tmp_path, name):
    dataset, test_split, answers, row, text = PUBLIC[name]
    every = [(row, label) for label in range(len(answers))]
    write_fake(tmp_path, dataset, list(answers), {"train": every, test_split: every[:1], "unused": every})
    task = load(name, tmp_path)
    assert {instance.input for instance in task.train} == {text}
    # Samples are shuffled; the test row has the first label.
    assert sorted(i.outputs[0] for i in task.train) == sorted(answers.values())
    assert [i.outputs[0] for i in task.test] == [next(iter(answers.values()))]
    assert task.metric == "exact_match_of_words"
    assert "tensorflow" not in sys.modules


def test_public_samples_are_seeded_and_have_the_published_size(tmp_path):
    rows = [({"premise": f"P{i}", "hypothesis": "H"}, i % 3) for i in range(400)]
    labels = ["entailment", "contradiction", "neutral"]
    write_fake(tmp_path, "super_glue/cb", labels, {"train": rows, "validation": rows[:60]})
    task = load("cb", tmp_path)
    assert (len(task.train), len(task.test)) == (250, 56)
    assert task == load("cb", tmp_path)
    other = load("cb", tmp_path, seed=1)
    assert {i.input for i in task.train} != {i.input for i in other.train}
    index = {f"sentence 1: {row['premise']}\nsentence 2: H": labels[label] for row, label in rows}
    assert all(index[instance.input] == instance.outputs[0] for instance in task.train)


def test_public_faults_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="TFDS holds no task 'yelp'"):
        load("yelp", tmp_path)
    with pytest.raises(FileNotFoundError, match="tfds build glue/sst2 --file_format=array_record"):
        load("sst2", tmp_path)
    rows = [({"sentence": "S"}, 0), ({"sentence": "S"}, -1)]
    write_fake(tmp_path, "glue/sst2", ["negative", "positive"], {"train": rows, "validation": rows[:1]})
    with pytest.raises(ValueError, match="train row 1 has an empty output"):
        load("sst2", tmp_path)
