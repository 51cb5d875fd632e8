"""Long Sequence tasks from TFDS' public datasets, for those that it holds (11 of 15).

Inputs have the form of the paper's data. The instructions are in our own words and the rows are drawn by our own
seed, so scores are not to be put beside the paper's. The datasets are read as prepared with
`tfds build NAME --file_format=array_record` (for super_glue that step, and only that, needs TensorFlow).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sapt_jax.data.sources.task_files import nearest_name, task_rng
from sapt_jax.data.sources.tfds_builders import PUBLISHED_SIZES, open_prepared
from sapt_jax.data.task import Instance, Task, read_instances


@dataclasses.dataclass(frozen=True)
class PublicTask:
    """dataset: its name in TFDS. test: the split to test on (those without gold labels are of no use).

    write: makes the input from a row's text features. answers: the output for each label name.
    """

    dataset: str
    test: str
    definition: str
    write: Callable[[Mapping[str, str]], str]
    answers: Mapping[str, str]


def _pair(first: str, second: str, names: tuple[str, str]) -> Callable[[Mapping[str, str]], str]:
    return lambda row: f"{names[0]}: {row[first]}\n{names[1]}: {row[second]}"


_SENTENCES = ("sentence 1", "sentence 2")
_ENTAILMENT = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
_TRUTH = {"False": "False", "True": "True"}

PUBLIC_TASKS: dict[str, PublicTask] = {
    "mnli": PublicTask(
        "glue/mnli",
        "validation_matched",
        "Does sentence 1 entail sentence 2, contradict it, or neither (neutral)? Give one of these three.",
        _pair("premise", "hypothesis", _SENTENCES),
        _ENTAILMENT,
    ),
    "cb": PublicTask(
        "super_glue/cb",
        "validation",
        "How does sentence 1 relate to sentence 2: entailment, contradiction or neutral?",
        _pair("premise", "hypothesis", _SENTENCES),
        _ENTAILMENT,
    ),
    "rte": PublicTask(
        "super_glue/rte",
        "validation",
        "Is sentence 2 an entailment of sentence 1, or a contradiction?",
        _pair("premise", "hypothesis", _SENTENCES),
        {"entailment": "entailment", "not_entailment": "contradiction"},
    ),
    "wic": PublicTask(
        "super_glue/wic",
        "validation",
        "Does the word have the same sense in both sentences? Say True or False.",
        lambda row: f"word: {row['word']}\n{row['sentence1']}\n{row['sentence2']}",
        _TRUTH,
    ),
    "copa": PublicTask(
        "super_glue/copa",
        "validation",
        "",
        lambda row: (
            f'Which sentence is the {row["question"]} of "{row["premise"]}"? Choose one between A and B.\n'
            f"A: {row['choice1']}\nB: {row['choice2']}"
        ),
        {"choice1": "A", "choice2": "B"},
    ),
    "qqp": PublicTask(
        "glue/qqp",
        "validation",
        "Do the two sentences mean the same? Say yes or no.",
        _pair("question1", "question2", ("first sentence", "second sentence")),
        {"not_duplicate": "no", "duplicate": "yes"},
    ),
    "boolq": PublicTask(
        "super_glue/boolq",
        "validation",
        "Is the answer to the question True or False, by the passage?",
        _pair("question", "passage", ("question", "passage")),
        _TRUTH,
    ),
    "multirc": PublicTask(
        "super_glue/multirc",
        "validation",
        "Is the candidate answer to the question True or False, by the paragraph?",
        lambda row: f"paragraph: {row['paragraph']}\nquestion: {row['question']}\ncandidate answer: {row['answer']}",
        _TRUTH,
    ),
    "imdb": PublicTask(
        "imdb_reviews/plain_text",
        "test",
        "Is this film review Good or Bad about the film?",
        lambda row: row["text"],
        {"neg": "Bad", "pos": "Good"},
    ),
    "sst2": PublicTask(
        "glue/sst2",
        "validation",
        "Is the feeling of this text Good or Bad?",
        lambda row: f"Text: {row['sentence']}",
        {"negative": "Bad", "positive": "Good"},
    ),
    "agnews": PublicTask(
        "ag_news_subset",
        "test",
        "What is this news article about: World, Sports, Business, or Science or Technology?",
        lambda row: f"Title: {row['title']}\nText: {row['description']}\n",
        {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Science or Technology"},
    ),
}


def read_public_task(name: str, *, root: Path, on_bad_instance: str, seed: int) -> Task:
    """Reads a task, seeded samples of the published sizes (or all rows of a smaller dataset); dev is ().

    `root` is the TFDS folder, or one with a folder `tfds`. Raises ValueError for a task that TFDS does not hold.
    """
    if name not in PUBLIC_TASKS:
        raise ValueError(f"TFDS holds no task {name!r}. {nearest_name(name, PUBLIC_TASKS)}")
    public = PUBLIC_TASKS[name]
    builder = open_prepared(public.dataset, root=root)
    labels = builder.info.features["label"].names
    problems: list[str] = []

    def entry(row: dict) -> dict:
        texts = {key: value.decode() for key, value in row.items() if isinstance(value, bytes)}
        label = int(row["label"])
        # Rows without a gold label carry -1: an empty output, for the setting to deal with.
        return {"input": public.write(texts), "output": public.answers[labels[label]] if label >= 0 else ""}

    def read(split: str, size: int, kind: str) -> tuple[Instance, ...]:
        rows = builder.as_data_source(split=split)
        chosen = np.sort(task_rng(seed, name, f"tfds {kind}").permutation(len(rows))[:size])
        return read_instances(
            ((f"{builder.data_path}: {split} row {i}", entry(rows[int(i)])) for i in chosen),
            prefix=f"{name}-{kind}",
            on_bad_instance=on_bad_instance,
            problems=problems,
        )

    train, test = PUBLISHED_SIZES[name]
    return Task(
        name,
        public.definition,
        read("train", train, "train"),
        (),
        read(public.test, test, "test"),
        labels=tuple(public.answers.values()),
        problems=tuple(problems),
    )
