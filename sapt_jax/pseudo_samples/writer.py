"""Pseudo-samples that the model writes itself: a block learns to write a task's inputs, and is sampled (section 3.3).

The writer is a run inside the run, with one LoRA block on the plain model. Its tasks are those of the run, their
sources a fixed cue, their answers the texts of `encode_texts`; every task starts from a fresh block. A method whose own
block learns to write (`Method.samples` is "texts") needs no other: its writer is the run itself, asked by each task's
own cue.

    WORKDIR/tasks/00-NAME/writer/                                     Orbax: the block in training
    WORKDIR/tasks/00-NAME/generated_data/BENCHMARK/NAME/train.json    the pool; where it is there, the task is done
    WORKDIR/tasks/00-NAME/generated_data/BENCHMARK/NAME/quality.json  how it compares with the real inputs
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sapt_jax import state
from sapt_jax.config import make_method
from sapt_jax.data.benchmarks import BENCHMARKS
from sapt_jax.data.buckets import choose_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged, encode_texts
from sapt_jax.data.prompts import CUE, EncodingRules, Writing
from sapt_jax.data.pseudo_samples import (
    PseudoSamples,
    check_answers,
    encode_pseudo_samples,
    pool_size,
    read_pseudo_samples,
)
from sapt_jax.data.stream import EncodedTask, Stream, cut_texts, encoding_rules, writing_rules
from sapt_jax.data.task import Instance, Task
from sapt_jax.decoding.answers import Ends, Sampling, make_sample
from sapt_jax.evaluation import Trees, mixture_weights
from sapt_jax.fit import Fitted, fit
from sapt_jax.methods.base import Seen
from sapt_jax.passes import map_sources
from sapt_jax.programs import make_apply, make_programs
from sapt_jax.pseudo_samples import written_samples
from sapt_jax.pseudo_samples.pools import lesson
from sapt_jax.pseudo_samples.written_samples import Collection
from sapt_jax.run import Run
from sapt_jax.state import Frozen, Trainable
from sapt_jax.storage import task_folders
from sapt_jax.storage.costs import Costs, Meter, write_costs
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically

EXAMPLES = 5
WRITER = "writer"


@dataclasses.dataclass(frozen=True)
class Writer:
    """What writes the pseudo-samples of a run.

    Attributes:
      run: learns the texts, one task after the other, where the method's own block has not learned them.
      sample: see `decoding.answers.make_sample`.
    """

    run: Run
    sample: Any


def make_writer(run: Run) -> Writer:
    """The writer of a run, for all of its tasks: they share its programs."""
    options, tokenizer = run.config.pseudo_samples.writer, run.tokenizer
    ends = Ends(options.max_length, tokenizer.eos_id, tokenizer.pad_id)
    own = dataclasses.replace(run, stream=_writer_stream(run), kind=WRITER)
    if not _writes_itself(run):
        config = _writer_config(run.config)
        method = make_method(config)
        programs = make_programs(config, run.model, method, run.mesh, ends)
        own = dataclasses.replace(own, config=config, method=method, programs=programs)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    return Writer(own, make_sample(make_apply(run.model), own.method, ends, sampling))


def _writes_itself(run: Run) -> bool:
    return run.method.samples == "texts"


def _writer_config(config: ConfigDict) -> Any:
    """The config of training a writer: one LoRA block, its own rates and steps, no early end."""
    options = config.pseudo_samples.writer
    own = config.copy_and_resolve_references()
    own.unlock()
    own.update_from_flattened_dict(
        {
            # The run around it draws by the same names.
            "seed": int(state.host_rng(config.seed, WRITER).integers(2**31)),
            "method": "sequential",
            "pet.kind": "lora",
            "pet.rank": options.rank,
            "pet.alpha": options.alpha,
            "pet.capacity": 0,
            "optimizer.learning_rate": options.learning_rate,
            # Those of the run name leaves of its own block and method.
            "optimizer.rates": ((".*", 1.0),),
            "optimizer.schedule": "constant",
            "optimizer.warmup_steps": 0,
            "train.batch_size": options.batch_size,
            "train.accumulation": 1,
            # One step at least is an epoch, so that the limit is what ends it.
            "train.epochs": options.steps,
            "train.max_steps": options.steps,
            "train.eval_every_epochs": options.steps,
        }
    )
    return own


def _writer_stream(run: Run) -> Stream:
    config, options = run.config, run.config.pseudo_samples.writer
    rules = dataclasses.replace(
        encoding_rules(config, run.tokenizer, run.model.padding_side),
        writing=Writing(CUE, options.answers, options.max_length),
    )
    empty = Ragged.from_rows([])
    nothing = EncodedSplit(empty, empty, 0, 0)

    def encode(task: EncodedTask) -> EncodedTask:
        texts = task.train.writing or encode_texts(task.task.train, task.task.definition, run.tokenizer, rules)
        return EncodedTask(task.task, texts, nothing, nothing, None)

    tasks = tuple(encode(task) for task in run.stream.tasks)
    buckets = choose_buckets(
        np.concatenate([task.train.lengths for task in tasks]),
        max_buckets=config.data.max_buckets,
        # The cue is always the same, the text takes the place of a source.
        source_multiple=1,
        target_multiple=config.data.source_multiple,
        prompt_length=0,
    )
    return dataclasses.replace(run.stream, tasks=tasks, unseen=(), buckets=tuple(buckets), prompt_length=0)


def write_pool(run: Run, writer: Writer, trees: Trees, task_index: int) -> EncodedSplit:
    """The pool of a task that has ended, written now unless it was before.

    Args:
      trees: frozen and trainable as the task left them; they say how the samples attend.
    """
    task = run.stream.tasks[task_index].task
    rules = _prompt_rules(run, task.name)

    def encode(pool: PseudoSamples) -> EncodedSplit:
        encoded = encode_pseudo_samples(pool, template=task.prompt, tokenizer=run.tokenizer, rules=rules)
        return cut_texts(encoded, run.stream.texts[1]) if run.stream.texts else encoded

    folder = task_folders.task_folder(run.workdir, task_index, task.name)
    file = written_samples.pool_file(folder, BENCHMARKS[run.config.benchmark].folder, task.name)
    if file.is_file():
        found = read_pseudo_samples(file.parent.parent, task.name, may_be_empty=True)
        if run.method.replay:
            check_answers(found, file)
        return encode(found)
    meter, before, learned = Meter(), Costs(), trees
    if not _writes_itself(run):
        blank = writer.run.empty(trees[0].base, 1)
        trainable, before = _train(writer, blank, task_index)
        learned = blank, trainable
    collection = _collect(writer, learned, task_index, rules)
    pool = collection.pool(task.name)
    encoded = encode(pool)
    quality = written_samples.describe_pool(pool, task) | _attention_gap(run, trees, task_index, encoded)
    run.log.log("pseudo_samples", task_index=task_index, task=task.name, step=0, **quality)
    _tell(run, task.name, collection, quality)
    write_costs(writer.run.folder(task_index), before + meter.read())
    if jax.process_index() == 0:
        report = {**quality, "wanted": collection.wanted, "rejected": collection.rejected}
        write_text_atomically(file.with_name("quality.json"), json.dumps(to_jsonable(report), indent=1) + "\n")
        write_text_atomically(file, written_samples.pool_json(pool))
    return encoded


def _prompt_rules(run: Run, name: str) -> EncodingRules:
    """Of the prompts that samples become: within the batch shapes, although a written definition may be long."""
    writing = writing_rules(run.config, name) if _writes_itself(run) else None
    rules = encoding_rules(run.config, run.tokenizer, run.model.padding_side)
    longest = max(source for source, _ in run.stream.buckets)
    return dataclasses.replace(rules, max_source_length=min(rules.max_source_length, longest), writing=writing)


def _train(writer: Writer, blank: Frozen, task_index: int) -> Fitted:
    run = writer.run

    def begin() -> Trainable:
        return run.programs.begin_task(blank, None, Seen(), run.task(task_index))

    return fit(run, blank, begin, lesson(run, {}, (task_index,)), None)


def _collect(writer: Writer, trees: Trees, task_index: int, rules: EncodingRules) -> Collection:
    """Draws texts from a trained writer until there are samples enough, or no more draws."""
    run, options = writer.run, writer.run.config.pseudo_samples
    task, rows, at = run.stream.tasks[task_index], run.layout.batch_size, run.task(task_index)
    size = pool_size(len(task.train), options.ratio, options.minimum)
    collection = Collection(size)
    cues = EncodedSplit(Ragged.from_rows([task.train.sources[0]] * rows), Ragged.from_rows([()] * rows), 0, 0)
    batches = -(-options.writer.draws * size // rows)
    for number in range(batches):
        key = state.rng(run.config.seed, "written samples", task_index, number)

        def draw(source: jax.Array, mask: jax.Array, key: jax.Array = key) -> tuple[jax.Array, ...]:
            return (writer.sample(*trees, source, mask, at, key),)

        (tokens,) = map_sources(draw, cues, run.layout, run.mesh)
        for row in tokens:
            collection.add(_judge(run, row, task.task, rules))
        if collection.full:
            return collection
    logging.getLogger(__name__).warning(
        "%s: the writer wrote %d of %d samples wanted in %d texts; the others were rejected (%s). In a new run, "
        "raise config.pseudo_samples.writer.steps, max_length or draws.",
        task.name,
        len(collection.samples),
        size,
        batches * rows,
        _counts(collection.rejected),
    )
    return collection


def _judge(run: Run, row: np.ndarray, task: Task, rules: EncodingRules) -> written_samples.Sample | str:
    """The sample in a row of drawn ids, or the reason why there is none."""
    ends = np.flatnonzero(row == run.tokenizer.eos_id)
    if not ends.size:
        return "no end"
    answers = run.config.pseudo_samples.writer.answers
    sample = written_samples.read_sample(run.tokenizer.decode(row[: ends[0]]), answers)
    if isinstance(sample, str):
        return sample
    if answers and task.labels and sample.answer not in task.labels:
        return "no label"
    alone = PseudoSamples(sample.definition, (Instance("", sample.input, (sample.answer,)),))
    encoded = encode_pseudo_samples(alone, template=task.prompt, tokenizer=run.tokenizer, rules=rules)
    return "too long" if encoded.truncated_sources or encoded.truncated_targets else sample


def _attention_gap(run: Run, trees: Trees, task_index: int, pool: EncodedSplit) -> dict[str, float]:
    """Mean KL in nats of the task's mean attention from that of its samples, and from that of its real inputs.

    The first is what the reflection loss starts from; the second is how far single inputs lie from their own mean.
    """
    task, at = run.stream.tasks[task_index], run.task(task_index)
    real = mixture_weights(run, trees, task.dev if len(task.dev) else task.train, at)
    target = real.mean(axis=0)
    kept = target > 0

    def mean_kl(weights: np.ndarray) -> float:
        return float(np.mean(np.sum(target[kept] * (np.log(target[kept]) - np.log(weights[:, kept])), axis=1)))

    gap = mean_kl(mixture_weights(run, trees, pool, at)) if len(pool) else float("nan")
    return {"attention_kl": gap, "real_attention_kl": mean_kl(real)}


def _counts(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items())) or "none"


def _tell(run: Run, name: str, collection: Collection, quality: Mapping[str, float]) -> None:
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
    run.console.print(
        f"pseudo-samples of {name}: {written} of {collection.wanted}, rejected: {_counts(collection.rejected)}; "
        f"{quality['copies']:.0%} copies of training inputs, {beside_real}",
        markup=False,
    )
    for sample in collection.samples[:EXAMPLES]:
        run.console.print(f"  {sample.input!r:.110}", markup=False)
