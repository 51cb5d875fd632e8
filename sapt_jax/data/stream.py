"""The stream of tasks of a run: read, tokenised, and its bucket shapes chosen, from the config."""

import dataclasses
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sapt_jax.data.batching import count_positions, epoch_plan
from sapt_jax.data.benchmarks import BENCHMARKS, load_task, load_unseen_task, resolve_data_dir, resolve_task_order
from sapt_jax.data.buckets import Bucket, check_buckets, choose_buckets
from sapt_jax.data.encoding import EncodedSplit, encode_split
from sapt_jax.data.prompts import EncodingRules
from sapt_jax.data.task import Task
from sapt_jax.methods import Method
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.pseudo_samples.read import encode_pseudo_samples, find_pseudo_dir, load_pseudo_samples


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

    `prompt_length` is that of the soft prompt before every source; `buckets` count the source's own tokens.
    """

    tasks: tuple[EncodedTask, ...]
    unseen: tuple[EncodedTask, ...]
    buckets: tuple[Bucket, ...]
    prompt_length: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

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
            plan = epoch_plan(
                task.train.lengths, self.buckets, batch_size=batch_size, seed=0, task_index=index, epoch=0
            )
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
        on_long_target=data.on_long_target,
    )


def split_names(names: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def load_stream(config: ConfigDict, tokenizer: Tokenizer, padding_side: str, method: Method) -> Stream:
    """Reads and tokenises every task of `config.task_order`, and the pseudo-samples where the method uses them.

    Raises:
      ValueError or FileNotFoundError: naming the file, row or config field at fault.
    """
    rules = encoding_rules(config, tokenizer, padding_side)
    source = config.pseudo_samples.source if method.samples else "none"
    prompt_length = method.pet.prompt_length
    names = resolve_task_order(config.task_order, config.benchmark)
    tasks = tuple(_load_encoded(name, config, tokenizer, rules, source) for name in names)
    unseen = tuple(_load_unseen(name, config, tokenizer, rules) for name in split_names(config.eval.unseen_tasks))
    if config.data.buckets:
        return Stream(tasks, unseen, tuple(check_buckets(config.data.buckets)), prompt_length)
    splits = [split for task in tasks + unseen for split in (task.train, task.dev, task.test, task.pseudo) if split]
    buckets = choose_buckets(
        np.concatenate([split.lengths for split in splits]),
        max_buckets=config.data.max_buckets,
        source_multiple=config.data.source_multiple,
        target_multiple=config.data.target_multiple,
        prompt_length=prompt_length,
    )
    return Stream(tasks, unseen, tuple(buckets), prompt_length)


def _load_encoded(
    name: str, config: ConfigDict, tokenizer: Tokenizer, rules: EncodingRules, pseudo_source: str
) -> EncodedTask:
    data = config.data
    task = load_task(
        name,
        benchmark=config.benchmark,
        source=config.data_source,
        data_dir=config.data_dir,
        dev_size=data.dev_size,
        dev_is_test=data.dev_is_test,
        max_train=data.max_train,
        max_dev=data.max_dev,
        max_test=data.max_test,
        seed=data.seed,
        on_bad_instance=data.on_bad_instance,
    )

    samples = load_pseudo_samples(
        task,
        source=pseudo_source,
        folder=_pseudo_folder(config) if pseudo_source == "files" else None,
        share=config.pseudo_samples.ratio,
        minimum=config.pseudo_samples.minimum,
        seed=data.seed,
    )
    pseudo = samples and encode_pseudo_samples(samples, template=task.prompt, tokenizer=tokenizer, rules=rules)
    return _encode(task, pseudo, config, tokenizer, rules)


def _load_unseen(name: str, config: ConfigDict, tokenizer: Tokenizer, rules: EncodingRules) -> EncodedTask:
    task = load_unseen_task(
        name,
        benchmark=config.benchmark,
        source=config.data_source,
        data_dir=config.data_dir,
        max_test=config.data.max_test,
        seed=config.data.seed,
        on_bad_instance=config.data.on_bad_instance,
    )
    return _encode(task, None, config, tokenizer, rules)


def _encode(
    task: Task, pseudo: EncodedSplit | None, config: ConfigDict, tokenizer: Tokenizer, rules: EncodingRules
) -> EncodedTask:
    def encode(instances):
        return encode_split(
            instances,
            definition=task.definition,
            template=task.prompt,
            tokenizer=tokenizer,
            rules=rules,
            seed=config.data.seed,
        )

    return EncodedTask(task, encode(task.train), encode(task.dev), encode(task.test), pseudo)


def _pseudo_folder(config: ConfigDict) -> Path:
    root = find_pseudo_dir(config.pseudo_samples.dir, resolve_data_dir(config.data_dir))
    return root / BENCHMARKS[config.benchmark].folder
