"""The benchmarks, their task orders, and `load_task`, which reads a task from any source and cuts its splits.

A new source is one function and one line in `SOURCES`; a new benchmark is one line in `BENCHMARKS`.
Sizes, orders and formats: the SAPT paper's public data (github.com/circle-hit/SAPT).
"""

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sapt_jax.data.sources.own_tasks import read_own_task
from sapt_jax.data.sources.task_files import (
    BenchmarkFolder,
    nearest_name,
    read_cl_benchmark,
    read_natural_instructions,
    task_rng,
)
from sapt_jax.data.task import Instance, Task, report_problems
from sapt_jax.storage.names import check_name

SUPERNI_CATEGORIES: dict[str, tuple[str, ...]] = {
    "dialogue generation": (
        "task639_multi_woz_user_utterance_generation",
        "task1590_diplomacy_text_generation",
        "task1729_personachat_generate_next",
    ),
    "information extraction": (
        "task181_outcome_extraction",
        "task748_glucose_reverse_cause_event_detection",
        "task1510_evalution_relation_extraction",
    ),
    "question answering": (
        "task002_quoref_answer_generation",
        "task073_commonsenseqa_answer_generation",
        "task591_sciq_answer_generation",
    ),
    "summarisation": (
        "task511_reddit_tifu_long_text_summarization",
        "task1290_xsum_summarization",
        "task1572_samsum_summary",
    ),
    "sentiment analysis": (
        "task363_sst2_polarity_classification",
        "task875_emotion_classification",
        "task1687_sentiment140_classification",
    ),
}
_SUPERNI = {int(name[4:].split("_")[0]): name for names in SUPERNI_CATEGORIES.values() for name in names}

# Named by their first task, because the numbers differ between repositories: in the order of the two
# benchmarks' tables, the paper's orders 1 to 4.
TASK_ORDERS: dict[str, tuple[str, ...]] = {
    "superni_1572": tuple(
        _SUPERNI[n] for n in (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875)
    ),
    "superni_748": tuple(
        _SUPERNI[n] for n in (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875)
    ),
    "long_mnli": tuple("mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo".split()),
    "long_yelp": tuple("yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic".split()),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A family of tasks with one protocol.

    folder: its name on disk. tasks: its task names (empty: whatever its source holds). source: a key of
    `SOURCES`, used unless the config names another. metric, prompt: of every task; "" leaves the task's own.
    """

    folder: str
    tasks: tuple[str, ...]
    source: str
    metric: str
    prompt: str


BENCHMARKS: dict[str, Benchmark] = {
    "superni": Benchmark("SuperNI", TASK_ORDERS["superni_1572"], "cl_benchmark", "rouge_l", "superni"),
    "long_sequence": Benchmark(
        "Long_Sequence", TASK_ORDERS["long_mnli"], "cl_benchmark", "exact_match_of_words", "long_sequence"
    ),
    "own": Benchmark("", (), "own", "", "plain"),
    "demo": Benchmark("", (), "demo", "", ""),
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the tasks of a run come from.

    Attributes:
      benchmark: a key of `BENCHMARKS`; it sets the metric and the prompt template.
      source: a key of `SOURCES`, or "" for the benchmark's usual one.
      data_dir: the data folder; None or "" reads SAPT_DATA_DIR.
      own_dir: a folder of own tasks, which come before those of the source; "" is none.
    """

    benchmark: str
    source: str
    data_dir: str | None
    own_dir: str = ""


@dataclasses.dataclass(frozen=True)
class SplitRules:
    """How the rows of a task become its splits; the same for every task of a run.

    Attributes:
      dev_size: instances to move from train to dev when the source has no dev of its own; never more than a
        fifth of train, and at least one unless it is 0.
      dev_is_test: dev is the test set, as in the paper's code (train then keeps every instance).
      max_train, max_dev, max_test: sampled sizes; 0 takes all.
      seed: of the cuts and samples (not of training, so that runs with several seeds share their splits).
      on_bad_instance: "error", "skip_empty", "skip" or "keep", see `task.read_instances`.
    """

    dev_size: int
    dev_is_test: bool
    max_train: int
    max_dev: int
    max_test: int
    seed: int
    on_bad_instance: str


def resolve_data_dir(data_dir: str | None) -> Path:
    """Returns the data folder: `data_dir` if given, else the environment variable SAPT_DATA_DIR."""
    chosen = data_dir or os.environ.get("SAPT_DATA_DIR", "")
    if not chosen:
        raise ValueError(
            "no data folder: set config.data_dir or the environment variable SAPT_DATA_DIR to the folder "
            "that holds the data (for the benchmarks: CL_Benchmark, and generated_data for pseudo-samples)."
        )
    root = Path(chosen).expanduser()
    if not root.is_dir():
        origin = "config.data_dir" if data_dir else "SAPT_DATA_DIR"
        raise FileNotFoundError(f"the data folder {root} does not exist ({origin} names it). Set it to one that does.")
    return root


def _from_cl_benchmark(name: str, benchmark: Benchmark, data_dir, on_bad_instance, seed) -> Task:
    folder = BenchmarkFolder(benchmark.folder, benchmark.tasks)
    return read_cl_benchmark(name, folder, root=resolve_data_dir(data_dir), on_bad_instance=on_bad_instance)


def _from_natural_instructions(name: str, benchmark: Benchmark, data_dir, on_bad_instance, seed) -> Task:
    return read_natural_instructions(
        name,
        root=resolve_data_dir(data_dir),
        known=benchmark.tasks,
        on_bad_instance=on_bad_instance,
        seed=seed,
    )


def _from_own(name: str, benchmark: Benchmark, data_dir, on_bad_instance, seed) -> Task:
    return read_own_task(name, root=resolve_data_dir(data_dir), on_bad_instance=on_bad_instance)


def _from_demo(name: str, benchmark: Benchmark, data_dir, on_bad_instance, seed) -> Task:
    # Imported on use: the demo needs packages that nothing else needs.
    demo = importlib.import_module("sapt_jax.data.sources.demo")
    return demo.load_demo_task(name, seed=seed, data_dir=data_dir or None)


def _from_tfds(name: str, benchmark: Benchmark, data_dir, on_bad_instance, seed) -> Task:
    # Imported on use: TFDS takes seconds.
    from sapt_jax.data.sources import tfds_builders

    return tfds_builders.read_prepared(
        name,
        root=resolve_data_dir(data_dir),
        folder=benchmark.folder,
        known=benchmark.tasks,
        on_bad_instance=on_bad_instance,
    )


def _from_tfds_public(name: str, benchmark: Benchmark, data_dir, on_bad_instance, seed) -> Task:
    # Imported on use: TFDS takes seconds.
    from sapt_jax.data.sources import tfds_public

    return tfds_public.read_public_task(
        name, root=resolve_data_dir(data_dir), on_bad_instance=on_bad_instance, seed=seed
    )


SOURCES: dict[str, Callable[..., Task]] = {
    "cl_benchmark": _from_cl_benchmark,
    "natural_instructions": _from_natural_instructions,
    "tfds": _from_tfds,
    "tfds_public": _from_tfds_public,
    "own": _from_own,
    "demo": _from_demo,
}


def _choose(table: dict, name: str, setting: str):
    if name not in table:
        raise ValueError(f"config.{setting}={name!r} is unknown; choose one of {', '.join(table)}.")
    return table[name]


def is_own(name: str, own_dir: str) -> bool:
    """Whether a task lies in the folder of own tasks."""
    return bool(own_dir) and (Path(own_dir).expanduser() / name).is_dir()


def resolve_task_order(
    task_order: str | Sequence[str], benchmark: str, setting: str = "config.task_order", own_dir: str = ""
) -> tuple[str, ...]:
    """Returns full task names, in order.

    Args:
      task_order: the name of an order in `TASK_ORDERS`, or task names (a sequence, or one string with
        commas). A benchmark's task may be shortened to its first word, as in "task1572".
      benchmark: a key of `BENCHMARKS`. Benchmarks with a fixed list of tasks reject unknown names, except
        that SuperNI takes any natural-instructions name ("task" and digits), which its source then has to
        hold.
      setting: where the order stands, for errors.
      own_dir: a folder of own tasks, whose names every benchmark takes too.

    Raises:
      ValueError: naming the setting and the name that is unknown, there twice, or cannot be a folder's.
    """
    known = _choose(BENCHMARKS, benchmark, "benchmark").tasks
    given = f"{setting}={task_order!r}"
    if isinstance(task_order, str):
        names = TASK_ORDERS.get(task_order) or tuple(part.strip() for part in task_order.split(",") if part.strip())
    else:
        names = tuple(task_order)
    if not names:
        raise ValueError(f"{given} is empty: name one of {', '.join(TASK_ORDERS)} or list task names.")
    full = []
    for name in names:
        check_name(name, given)
        matches = [task for task in known if task == name or task.split("_")[0] == name]
        is_natural_instruction = benchmark == "superni" and name[:4] == "task" and name[4:5].isdigit() and "_" in name
        if known and not matches and not is_natural_instruction and not is_own(name, own_dir):
            orders = [order for order, tasks in TASK_ORDERS.items() if set(tasks) == set(known)]
            raise ValueError(f"{given}: unknown task {name!r} of {benchmark}. {nearest_name(name, [*known, *orders])}")
        full.append(matches[0] if matches else name)
    repeated = sorted({name for name in full if full.count(name) > 1})
    if repeated:
        raise ValueError(f"{given} names {', '.join(repeated)} more than once: every task may occur once.")
    return tuple(full)


def _sample(instances: tuple[Instance, ...], size: int, rng: np.random.Generator) -> tuple[Instance, ...]:
    if size <= 0 or size >= len(instances):
        return instances
    return tuple(instances[i] for i in np.sort(rng.choice(len(instances), size, replace=False)))


def cut_splits(task: Task, rules: SplitRules) -> Task:
    """Cuts dev out of train and samples every split. Pure: depends on the arguments alone."""

    def sample(split: str, instances: tuple[Instance, ...], size: int) -> tuple[Instance, ...]:
        return _sample(instances, size, task_rng(rules.seed, task.name, split))

    train, dev, test = task.train, task.dev, sample("test", task.test, rules.max_test)
    if rules.dev_is_test:
        dev = test
    elif not dev and rules.dev_size > 0:
        size = max(1, min(rules.dev_size, len(train) // 5))
        if len(train) < 2:
            raise ValueError(
                f"{task.name}: cannot cut dev from {len(train)} training instance(s); set config.data.dev_size=0."
            )
        chosen = set(task_rng(rules.seed, task.name, "dev").choice(len(train), size, replace=False).tolist())
        dev = tuple(instance for i, instance in enumerate(train) if i in chosen)
        train = tuple(instance for i, instance in enumerate(train) if i not in chosen)
    train, dev = sample("train", train, rules.max_train), sample("sample_dev", dev, rules.max_dev)
    return dataclasses.replace(task, train=train, dev=dev, test=test)


def load_task(name: str, origin: Origin, rules: SplitRules) -> Task:
    """Reads one task and cuts its splits; `name` is a full task name (see `resolve_task_order`).

    Raises:
      ValueError or FileNotFoundError: naming the file, the row or the setting at fault.
    """
    benchmark = _choose(BENCHMARKS, origin.benchmark, "benchmark")
    source = origin.source or benchmark.source
    read, data_dir = _choose(SOURCES, source, "data_source"), origin.data_dir
    if is_own(name, origin.own_dir):
        source, read, data_dir = "own", _from_own, origin.own_dir
    task = read(name, benchmark, data_dir, rules.on_bad_instance, rules.seed)
    for split in ("train", "test"):
        if not getattr(task, split):
            raise ValueError(
                f"{name}: its {split} split is empty (source {source!r}). Fill it, or take the task out of "
                "config.task_order."
            )
    report_problems(task, rules.on_bad_instance)
    return cut_splits(_of_benchmark(task, benchmark), rules)


def load_unseen_task(name: str, origin: Origin, rules: SplitRules) -> Task:
    """Reads a task that is only tested; train and dev are ().

    It comes from the origin's source where one is named, such as a clone of natural-instructions, else from
    `CL_Benchmark_unseen/{benchmark folder}/{name}/test.json`. Errors as in `load_task`.
    """
    benchmark = _choose(BENCHMARKS, origin.benchmark, "benchmark")
    if origin.source:
        read = _choose(SOURCES, origin.source, "data_source")
        task = read(name, benchmark, origin.data_dir, rules.on_bad_instance, rules.seed)
    else:
        folder = BenchmarkFolder(benchmark.folder, parent="CL_Benchmark_unseen", splits=("test",))
        root = resolve_data_dir(origin.data_dir)
        task = read_cl_benchmark(name, folder, root=root, on_bad_instance=rules.on_bad_instance)
    if not task.test:
        raise ValueError(f"{name}: its test split is empty. Fill it, or take the task out of config.eval.unseen_tasks.")
    report_problems(task, rules.on_bad_instance)
    test = _sample(task.test, rules.max_test, task_rng(rules.seed, name, "test"))
    return dataclasses.replace(_of_benchmark(task, benchmark), train=(), dev=(), test=test)


def _of_benchmark(task: Task, benchmark: Benchmark) -> Task:
    """The task with the metric and the prompt that the benchmark sets."""
    return dataclasses.replace(task, metric=benchmark.metric or task.metric, prompt=benchmark.prompt or task.prompt)
