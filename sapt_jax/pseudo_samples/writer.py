"""Pseudo-samples that the model writes itself: a block learns to write a task's inputs, and is sampled (section 3.3).

The generator is an ordinary learner with one LoRA block on the plain model. Its tasks are those of the run, their
sources a fixed cue, their answers the texts of `data.written_samples`; every task starts from a fresh block.

    WORKDIR/tasks/00-NAME/generator/                                  Orbax: the block in training
    WORKDIR/tasks/00-NAME/generated_data/BENCHMARK/NAME/train.json    the pool; where it is there, the task is done
    WORKDIR/tasks/00-NAME/generated_data/BENCHMARK/NAME/quality.json  how it compares with the real inputs
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sapt_jax.data.benchmarks import BENCHMARKS
from sapt_jax.data.buckets import choose_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.data.prompts import EncodingRules, encode_prompt, make_prompt
from sapt_jax.data.stream import EncodedTask, Stream, encoding_rules
from sapt_jax.data.task import Task
from sapt_jax.decoding.search import make_sample
from sapt_jax.fit import fit
from sapt_jax.passes import map_sources
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.pseudo_samples import written_samples
from sapt_jax.pseudo_samples.read import encode_pseudo_samples, pool_size, read_pseudo_samples
from sapt_jax.pseudo_samples.written_samples import Collection
from sapt_jax.results.curves import RunLog
from sapt_jax.run import Learner, make_learner, make_method
from sapt_jax.state import Frozen, Trainable
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically

EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Generator:
    """What writes the pseudo-samples of a run.

    Attributes:
      config: the run's config, with the generator's settings in place of the learner's.
      writer: learns the texts.
      sample: see `decoding.make_sample`.
    """

    config: Any
    writer: Learner
    sample: Any


def make_generator(config: Any, learner: Learner) -> Generator:
    """The generator of a run, for all of its tasks: they share its programs."""
    own = generator_config(config)
    options = config.pseudo_samples.generator
    model, tokenizer = learner.model, learner.tokenizer
    stream = _generator_stream(config, learner)
    writer = make_learner(own, model, make_method(own), tokenizer, stream, learner.mesh)
    sample = make_sample(
        model,
        writer.method,
        options.max_length,
        tokenizer.eos_id,
        tokenizer.pad_id,
        options.temperature,
        options.top_k,
        options.top_p,
    )
    return Generator(own, writer, sample)


def generator_config(config: Any) -> Any:
    """The config of training a generator: one LoRA block, its own rates and steps, no early end."""
    options = config.pseudo_samples.generator
    own = config.copy_and_resolve_references()
    own.unlock()
    own.update_from_flattened_dict(
        {
            "method": "seq_lora",
            "pet.kind": "lora",
            "pet.rank": options.rank,
            "pet.alpha": options.alpha,
            "optimizer.learning_rate": options.learning_rate,
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 0,
            "attention.warm_start_steps": 0,
            "train.batch_size": options.batch_size,
            "train.accumulation": 1,
            # One step at least is an epoch, so that the limit is what ends it.
            "train.epochs": options.steps,
            "train.max_steps": options.steps,
            "train.eval_every_epochs": options.steps,
        }
    )
    return own


def _generator_stream(config: Any, learner: Learner) -> Stream:
    options = config.pseudo_samples.generator
    rules = encoding_rules(config, learner.tokenizer, learner.model.padding_side)
    empty = Ragged.from_rows([])
    nothing = EncodedSplit(empty, empty, 0, 0)

    def encode(task: Task) -> EncodedTask:
        split = written_samples.encode_generator_split(
            task, answers=options.answers, tokenizer=learner.tokenizer, rules=rules, max_length=options.max_length
        )
        return EncodedTask(task, split, nothing, nothing, None)

    tasks = tuple(encode(task.task) for task in learner.stream.tasks)
    buckets = choose_buckets(
        np.concatenate([task.train.lengths for task in tasks]),
        max_buckets=config.data.max_buckets,
        # The cue is always the same, the text takes the place of a source.
        source_multiple=1,
        target_multiple=config.data.source_multiple,
        prompt_length=0,
    )
    return Stream(tasks, (), tuple(buckets), 0)


def with_written_pool(
    config: Any,
    generator: Generator,
    learner: Learner,
    frozen: Frozen,
    trainable: Trainable,
    task_index: int,
    folder: Path,
    log: RunLog,
    console: Console,
) -> Learner:
    """The learner with the pool of a committed task, written now unless it was before.

    Args:
      frozen, trainable: as the task left them; they say how the samples attend.
      folder: the task's folder.
    """
    task = learner.stream.tasks[task_index].task
    rules = _prompt_rules(config, learner)
    encode = functools.partial(encode_pseudo_samples, template=task.prompt, tokenizer=learner.tokenizer, rules=rules)
    file = written_samples.pool_file(folder, BENCHMARKS[config.benchmark].folder, task.name)
    if file.is_file():
        encoded = encode(read_pseudo_samples(file.parent.parent, task.name))
    else:
        blank = generator.writer.init_frozen(frozen.base, 1, ())
        trained = _train(config, generator, blank, task_index, folder, log, console)
        collection = _collect(config, generator, blank, trained, task_index, rules)
        pool = collection.pool(task.name)
        encoded = encode(pool)
        quality = written_samples.describe_pool(pool, task)
        quality |= _attention_gap(learner, frozen, trainable, task_index, encoded)
        log.log("pseudo_samples", task_index=task_index, task=task.name, step=0, **quality)
        _tell(console, task.name, collection, quality)
        if jax.process_index() == 0:
            report = {**quality, "wanted": collection.wanted, "rejected": collection.rejected}
            write_text_atomically(file.with_name("quality.json"), json.dumps(to_jsonable(report), indent=1) + "\n")
            write_text_atomically(file, written_samples.pool_json(pool))
    return dataclasses.replace(learner, stream=learner.stream.with_pseudo(task_index, encoded))


def _prompt_rules(config: Any, learner: Learner) -> EncodingRules:
    """Of the prompts that samples become: within the batch shapes, although a written definition may be long."""
    rules = encoding_rules(config, learner.tokenizer, learner.model.padding_side)
    longest = max(source for source, _ in learner.stream.buckets)
    return dataclasses.replace(rules, max_source_length=min(rules.max_source_length, longest))


def _train(
    config: Any, generator: Generator, frozen: Frozen, task_index: int, folder: Path, log: RunLog, console: Console
) -> Trainable:
    writer = generator.writer
    fresh = writer.open_task(config.seed, task_index, frozen.base, None)
    return fit(generator.config, writer, frozen, fresh, task_index, folder / "generator", log, "generator", console)


def _collect(
    config: Any, generator: Generator, frozen: Frozen, trained: Trainable, task_index: int, rules: EncodingRules
) -> Collection:
    """Draws texts from a trained generator until there are samples enough, or no more draws."""
    writer, options = generator.writer, config.pseudo_samples.generator
    task, rows = writer.stream.tasks[task_index], writer.layout.batch_size
    size = pool_size(len(task.train), config.pseudo_samples.ratio, config.pseudo_samples.minimum)
    collection = Collection(size)
    cues = EncodedSplit(Ragged.from_rows([task.train.sources[0]] * rows), Ragged.from_rows([()] * rows), 0, 0)
    batches = -(-options.draws * size // rows)
    rngs = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), task_index), batches)
    for rng in rngs:
        draw = functools.partial(generator.sample, frozen, trained, slot_index=np.int32(0), rng=rng)
        (tokens,) = map_sources(lambda *source, draw=draw: (draw(*source),), cues, writer.layout)
        for row in tokens:
            collection.add(_judge(row, writer.tokenizer, task.task, rules, options.answers))
        if collection.full:
            return collection
    logging.getLogger(__name__).warning(
        "%s: the generator wrote %d of %d samples wanted in %d texts; the others were rejected (%s). In a new run, "
        "raise config.pseudo_samples.generator.steps, max_length or draws.",
        task.name,
        len(collection.samples),
        size,
        batches * rows,
        _counts(collection.rejected),
    )
    return collection


def _judge(
    row: np.ndarray, tokenizer: Tokenizer, task: Task, rules: EncodingRules, answers: bool
) -> written_samples.Sample | str:
    """The sample in a row of drawn ids, or the reason why there is none."""
    ends = np.flatnonzero(row == tokenizer.eos_id)
    if not ends.size:
        return "no end"
    sample = written_samples.read_sample(tokenizer.decode(row[: ends[0]]), answers)
    if isinstance(sample, str):
        return sample
    _, cut = encode_prompt(make_prompt(task.prompt, sample.definition, sample.input), tokenizer, rules)
    return "too long" if cut else sample


def _attention_gap(
    learner: Learner, frozen: Frozen, trainable: Trainable, task_index: int, pool: EncodedSplit
) -> dict[str, float]:
    """Mean KL in nats of the recorded attention of the task from that of its samples, and from that of its real inputs.

    The first is what the reflection loss starts from; the second is how far single inputs lie from their own mean.
    """
    task, slot = learner.stream.tasks[task_index], learner.method.slot_index(task_index)
    target = np.asarray(frozen.targets)[slot]
    kept = target > 0

    def mean_kl(split: EncodedSplit) -> float:
        if not len(split):
            return float("nan")
        weights = learner.attention(frozen, trainable, split, slot)[:, kept]
        return float(np.mean(np.sum(target[kept] * (np.log(target[kept]) - np.log(weights)), axis=1)))

    return {"attention_kl": mean_kl(pool), "real_attention_kl": mean_kl(task.dev if len(task.dev) else task.train)}


def _counts(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items())) or "none"


def _tell(console: Console, name: str, collection: Collection, quality: Mapping[str, float]) -> None:
    written = len(collection.samples)
    beside_real = ", ".join(
        f"{label} {quality[field]:.3g} (real {quality['real_' + field]:.3g})"
        for label, field in (
            ("distinct-1", "distinct_1"),
            ("distinct-2", "distinct_2"),
            ("words", "words"),
            ("attention KL", "attention_kl"),
        )
    )
    console.print(
        f"pseudo-samples of {name}: {written} of {collection.wanted}, rejected: {_counts(collection.rejected)}; "
        f"{quality['copies']:.0%} copies of training inputs, {beside_real}",
        markup=False,
    )
    for sample in collection.samples[:EXAMPLES]:
        console.print(f"  {sample.input!r:.110}", markup=False)
