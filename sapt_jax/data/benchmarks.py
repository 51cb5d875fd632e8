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
from sapt_jax.data.sources.task_files import nearest_name, read_cl_benchmark, read_natural_instructions, task_rng
from sapt_jax.data.task import Instance, Task, report_problems

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
        "Long_Sequence", TASK_ORDERS["long_mnli"], "cl_benchmark", "exact_match", "long_sequence"
    ),
    "own": Benchmark("", (), "own", "", "plain"),
    "demo": Benchmark("", (), "demo", "", ""),
}


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
    return read_cl_benchmark(
        name,
        root=resolve_data_dir(data_dir),
        benchmark_folder=benchmark.folder,
        known=benchmark.tasks,
        on_bad_instance=on_bad_instance,
    )


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


def _choose(table: dict, name: str, what: str):
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}. {nearest_name(name, table)}")
    return table[name]


def resolve_task_order(task_order: str | Sequence[str], benchmark: str) -> tuple[str, ...]:
    """Returns full task names, in order.

    Args:
      task_order: the name of an order in `TASK_ORDERS`, or task names (a sequence, or one string with
        commas). A benchmark's task may be shortened to its first word, as in "task1572".
      benchmark: a key of `BENCHMARKS`. Benchmarks with a fixed list of tasks reject unknown names, except
        that SuperNI takes any natural-instructions name ("task" and digits), which its source then has to
        hold.
    """
    known = _choose(BENCHMARKS, benchmark, "benchmark").tasks
    if isinstance(task_order, str):
        names = TASK_ORDERS.get(task_order) or tuple(part.strip() for part in task_order.split(",") if part.strip())
    else:
        names = tuple(task_order)
    if not names:
        raise ValueError(f"the task order is empty: name one of {', '.join(TASK_ORDERS)} or list task names.")
    full = []
    for name in names:
        matches = [task for task in known if task == name or task.split("_")[0] == name]
        is_natural_instruction = benchmark == "superni" and name[:4] == "task" and name[4:5].isdigit() and "_" in name
        if known and not matches and not is_natural_instruction:
            orders = [order for order, tasks in TASK_ORDERS.items() if set(tasks) == set(known)]
            raise ValueError(f"unknown task {name!r} of {benchmark}. {nearest_name(name, [*known, *orders])}")
        full.append(matches[0] if matches else name)
    repeated = sorted({name for name in full if full.count(name) > 1})
    if repeated:
        raise ValueError(f"the task order names {', '.join(repeated)} more than once: every task may occur once.")
    return tuple(full)


def _sample(instances: tuple[Instance, ...], size: int, rng: np.random.Generator) -> tuple[Instance, ...]:
    if size <= 0 or size >= len(instances):
        return instances
    return tuple(instances[i] for i in np.sort(rng.choice(len(instances), size, replace=False)))


def cut_splits(
    task: Task, *, dev_size: int, dev_is_test: bool, max_train: int, max_dev: int, max_test: int, seed: int
) -> Task:
    """Cuts dev out of train and samples every split. Pure: depends on the arguments alone.

    Args:
      dev_size: instances to move from train to dev when the source has no dev of its own; never more than a
        fifth of train, and at least one unless it is 0.
      dev_is_test: dev is the test set, as in the paper's code (train then keeps every instance).
      max_train, max_dev, max_test: sampled sizes; 0 takes all.
    """
    train, dev, test = task.train, task.dev, _sample(task.test, max_test, task_rng(seed, task.name, "test"))
    if dev_is_test:
        dev = test
    elif not dev and dev_size > 0:
        size = max(1, min(dev_size, len(train) // 5))
        if len(train) < 2:
            raise ValueError(f"{task.name}: cannot cut dev from {len(train)} training instance(s); set dev_size=0.")
        chosen = set(task_rng(seed, task.name, "dev").choice(len(train), size, replace=False).tolist())
        dev = tuple(instance for i, instance in enumerate(train) if i in chosen)
        train = tuple(instance for i, instance in enumerate(train) if i not in chosen)
    train = _sample(train, max_train, task_rng(seed, task.name, "train"))
    dev = _sample(dev, max_dev, task_rng(seed, task.name, "sample_dev"))
    return dataclasses.replace(task, train=train, dev=dev, test=test)


def load_task(
    name: str,
    *,
    benchmark: str,
    source: str,
    data_dir: str | None,
    dev_size: int,
    dev_is_test: bool,
    max_train: int,
    max_dev: int,
    max_test: int,
    seed: int,
    on_bad_instance: str,
) -> Task:
    """Reads one task and cuts its splits.

    Args:
      name: a full task name (see `resolve_task_order`).
      benchmark: a key of `BENCHMARKS`; it sets the metric and the prompt template.
      source: a key of `SOURCES`, or "" for the benchmark's usual one.
      data_dir: the data folder; None or "" reads SAPT_DATA_DIR.
      seed: of the cuts and samples (not of training, so that runs with several seeds share their splits).
      on_bad_instance: "error", "skip_empty", "skip" or "keep", see `task.read_instances`.
    Raises: ValueError or FileNotFoundError naming the file, the row or the setting at fault.
    """
    chosen = _choose(BENCHMARKS, benchmark, "benchmark")
    read = _choose(SOURCES, source or chosen.source, "data source")
    task = read(name, chosen, data_dir, on_bad_instance, seed)
    for split in ("train", "test"):
        if not getattr(task, split):
            raise ValueError(
                f"{name}: its {split} split is empty (source {source or chosen.source!r}). Fill it, or take the task "
                "out of config.task_order."
            )
    task = dataclasses.replace(task, metric=chosen.metric or task.metric, prompt=chosen.prompt or task.prompt)
    report_problems(task, on_bad_instance)
    return cut_splits(
        task,
        dev_size=dev_size,
        dev_is_test=dev_is_test,
        max_train=max_train,
        max_dev=max_dev,
        max_test=max_test,
        seed=seed,
    )


def load_unseen_task(
    name: str, *, benchmark: str, source: str, data_dir: str | None, max_test: int, seed: int, on_bad_instance: str
) -> Task:
    """Reads a task that is only tested; train and dev are ().

    It comes from `source` where one is named, such as a clone of natural-instructions, else from
    `CL_Benchmark_unseen/{benchmark folder}/{name}/test.json`.

    Arguments and errors as in `load_task`.
    """
    chosen = _choose(BENCHMARKS, benchmark, "benchmark")
    if source:
        task = _choose(SOURCES, source, "data source")(name, chosen, data_dir, on_bad_instance, seed)
    else:
        task = read_cl_benchmark(
            name,
            root=resolve_data_dir(data_dir),
            benchmark_folder=chosen.folder,
            known=(),
            splits=("test",),
            on_bad_instance=on_bad_instance,
            parent="CL_Benchmark_unseen",
        )
    if not task.test:
        raise ValueError(f"{name}: its test split is empty. Fill it, or take the task out of config.eval.unseen_tasks.")
    report_problems(task, on_bad_instance)
    test = _sample(task.test, max_test, task_rng(seed, name, "test"))
    metric, prompt = chosen.metric or task.metric, chosen.prompt or task.prompt
    return dataclasses.replace(task, train=(), dev=(), test=test, metric=metric, prompt=prompt)
