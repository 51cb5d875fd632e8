"""The stream of tasks of a run: read, tokenised, and its bucket shapes chosen, from the config."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from sapt_jax.data.batching import Layout, count_positions, epoch_plan
from sapt_jax.data.benchmarks import (
    BENCHMARKS,
    Origin,
    SplitRules,
    is_own,
    load_task,
    load_unseen_task,
    resolve_data_dir,
    resolve_task_order,
)
from sapt_jax.data.buckets import Bucket, check_buckets, choose_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged, encode_split, join
from sapt_jax.data.general import load_general
from sapt_jax.data.lesson import make_lesson
from sapt_jax.data.prompts import CUE, EncodingRules, Writing
from sapt_jax.data.pseudo_samples import PoolOrigin, encode_pseudo_samples, find_pseudo_dir, load_pseudo_samples
from sapt_jax.data.task import Task
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.storage.names import check_name


@dataclasses.dataclass(frozen=True)
class EncodedTask:
    """A task and its splits as token ids, row for row. `pseudo` is its pool of pseudo-samples, or None."""

    task: Task
    train: EncodedSplit
    dev: EncodedSplit
    test: EncodedSplit
    pseudo: EncodedSplit | None

    @property
    def name(self) -> str:
        return self.task.name


@dataclasses.dataclass(frozen=True)
class Stream:
    """All tasks of a run in order, those that are only tested at its end, and the batch shapes that they share.

    Attributes:
      general: passages of a text that no task is about, or None.
      buckets: batch shapes; they count the source's own tokens.
      prompt_length: of all soft prompts before a source.
      padding_side, pad_id, texts: see `Layout`.
    """

    tasks: tuple[EncodedTask, ...]
    unseen: tuple[EncodedTask, ...]
    general: EncodedSplit | None
    buckets: tuple[Bucket, ...]
    prompt_length: int
    padding_side: str
    pad_id: int
    texts: tuple[int, int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def layout(self, batch_size: int) -> Layout:
        """How the rows of any split become batches."""
        return Layout(self.buckets, batch_size, self.padding_side, self.pad_id, texts=self.texts)

    def truncated(self) -> dict[str, tuple[int, int]]:
        """Of every task: how many prompts and how many answers were cut to the limits, over all splits."""
        counts = {}
        for task in self.tasks + self.unseen:
            splits = (task.train, task.dev, task.test)
            counts[task.name] = (
                sum(split.truncated_sources for split in splits),
                sum(split.truncated_targets for split in splits),
            )
        return counts

    def occupancy(self, batch_size: int) -> dict[str, tuple[int, int]]:
        """Tokens and positions of one training epoch of each task, those of soft prompts among both."""
        counts = {}
        for index, task in enumerate(self.tasks):
            lesson = make_lesson(index, {index: task.train}, {}, 0.0)
            plan = epoch_plan(lesson, self.layout(batch_size), seed=0, epoch=0)
            tokens = int(task.train.lengths.sum()) + self.prompt_length * len(task.train)
            counts[task.name] = tokens, count_positions(plan, self.prompt_length)
        return counts

    def padding(self, batch_size: int) -> float:
        """The share of the positions of one training epoch of all tasks that holds no token."""
        tokens, positions = map(sum, zip(*self.occupancy(batch_size).values(), strict=True))
        return 1.0 - tokens / positions


def encoding_rules(config: ConfigDict, tokenizer: Tokenizer, padding_side: str) -> EncodingRules:
    """How the run turns text into ids, from `config.data` and the model's kind."""
    data = config.data
    return EncodingRules(
        family="decoder_only" if padding_side == "left" else "encoder_decoder",
        add_bos=tokenizer.add_bos if data.add_bos is None else data.add_bos,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        truncation=data.truncation,
        target_keeps_end=data.target_keeps_end,
        references=data.references,
        seed=data.seed,
        on_long_target=data.on_long_target,
    )


def writing_rules(config: ConfigDict, name: str) -> Writing:
    """How rows of a task become texts, for a block that learns to write those of several, each called by its name."""
    return Writing(f"{CUE} {name}", True, config.pseudo_samples.writer.max_length)


def order_of(config: ConfigDict) -> tuple[str, ...]:
    """The tasks of config.task_order by their full names; errors as of `resolve_task_order`."""
    return resolve_task_order(config.task_order, config.benchmark, own_dir=config.own_dir)


def disabled_of(config: ConfigDict) -> tuple[str, ...]:
    """The tasks of config.disabled_tasks, of which there may be none, by their full names."""
    if not config.disabled_tasks:
        return ()
    return resolve_task_order(config.disabled_tasks, config.benchmark, "config.disabled_tasks", config.own_dir)


def split_names(names: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def load_stream(
    config: ConfigDict, tokenizer: Tokenizer, *, padding_side: str, prompt_length: int, samples: str | None
) -> Stream:
    """Reads and tokenises every task of `config.task_order`, and its pseudo-samples.

    Args:
      padding_side: of the sources, as the model wants it.
      prompt_length: of the soft prompt before every source.
      samples: what the method wants of earlier tasks, see `Method`.

    Raises:
      ValueError or FileNotFoundError: naming the file, row or config field at fault.
    """
    names = order_of(config)
    data, rules = config.data, encoding_rules(config, tokenizer, padding_side)
    origin = Origin(config.benchmark, config.data_source, config.data_dir, config.own_dir)
    cuts = SplitRules(**{field.name: data[field.name] for field in dataclasses.fields(SplitRules)})
    pools = _pool_origin(config, samples) if samples else None
    encode = functools.partial(_encode, tokenizer=tokenizer, rules=rules)
    # Nobody has written pools of a user's own tasks.
    own_pools = pools and (dataclasses.replace(pools, source="train") if pools.source == "files" else pools)
    tasks = tuple(
        encode(
            load_task(name, origin, cuts),
            own_pools if is_own(name, config.own_dir) else pools,
            writing=writing_rules(config, name) if samples == "texts" else None,
        )
        for name in names
    )
    given = f"config.eval.unseen_tasks={config.eval.unseen_tasks!r}"
    unseen_names = [check_name(name, given) for name in split_names(config.eval.unseen_tasks)]
    unseen = tuple(encode(load_unseen_task(name, origin, cuts), None) for name in unseen_names)
    if data.buckets:
        buckets = check_buckets(data.buckets)
    else:
        splits = [split for task in tasks + unseen for split in (task.train, task.dev, task.test, task.pseudo) if split]
        buckets = choose_buckets(
            np.concatenate([split.lengths for split in splits]),
            max_buckets=data.max_buckets,
            source_multiple=data.source_multiple,
            target_multiple=data.target_multiple,
            prompt_length=prompt_length,
        )
    general, texts = load_general(config.eval.general, config.data_dir, tokenizer, rules), _texts(tasks)
    return Stream(tasks, unseen, general, tuple(buckets), prompt_length, padding_side, tokenizer.pad_id, texts)


def _encode(
    task: Task,
    pools: PoolOrigin | None,
    *,
    tokenizer: Tokenizer,
    rules: EncodingRules,
    writing: Writing | None = None,
) -> EncodedTask:
    samples = load_pseudo_samples(task, pools) if pools else None
    with_answers = pools is not None and pools.with_answers
    learned = dataclasses.replace(rules, writing=writing)
    pseudo = samples and encode_pseudo_samples(
        samples, template=task.prompt, tokenizer=tokenizer, rules=learned, with_answers=with_answers
    )
    train, dev, test = (
        encode_split(instances, definition=task.definition, template=task.prompt, tokenizer=tokenizer, rules=own)
        for instances, own in ((task.train, learned), (task.dev, rules), (task.test, rules))
    )
    return EncodedTask(task, train, dev, test, pseudo)


def _texts(tasks: Sequence[EncodedTask]) -> tuple[int, int] | None:
    """The longest cue, and the most tokens that a text has more than its row's prompt and answer."""
    splits = [split for task in tasks for split in (task.train, task.pseudo) if split and split.writing]
    if not splits:
        return None
    rows = join(splits)
    texts = rows.writing.lengths
    return int(texts[:, 0].max()), int((texts[:, 1] - rows.lengths.sum(axis=1)).max())


def cut_texts(split: EncodedSplit, surplus: int) -> EncodedSplit:
    """A split whose texts have at most `surplus` tokens more than their rows; a cut one then has no end."""
    if split.writing is None:
        return split
    limits = split.lengths.sum(axis=1) + surplus
    texts = Ragged.from_rows([split.writing.targets[row][:limit] for row, limit in enumerate(limits)])
    return dataclasses.replace(split, writing=dataclasses.replace(split.writing, targets=texts))


def _pool_origin(config: ConfigDict, samples: str) -> PoolOrigin:
    options, folder = config.pseudo_samples, None
    if options.source == "files":
        root = find_pseudo_dir(options.dir, resolve_data_dir(config.data_dir))
        folder = root / BENCHMARKS[config.benchmark].folder
    sample = (options.ratio, options.minimum, config.data.seed)
    return PoolOrigin(
        options.source,
        folder,
        *sample,
        # Rows that are trained on have their answers as targets.
        with_answers=options.pool_answers and samples == "inputs",
        needs_answers=samples != "inputs",
    )
