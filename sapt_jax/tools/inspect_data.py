"""A look at a run's data, before it runs:

    python -m sapt_jax.tools.inspect_data --config=configs/smollm2_superni.py

Reads, tokenises and batches every task exactly as the run would, and prints for each: instances, token
lengths, how much is cut, answers that occur often, an example, test inputs that also occur in training, and
the pseudo-samples; and for all: the bucket shapes and what share of every batch is padding. Loads a
tokenizer, but no model weights.
"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich import box
from rich.console import Console
from rich.table import Table

from sapt_jax.command_line import parse_flags, told_in_one_line
from sapt_jax.config import check_config
from sapt_jax.data.batching import Prefetch, Share, Steps, eval_batches, steps_per_epoch, train_batches
from sapt_jax.data.lesson import make_lesson
from sapt_jax.data.stream import EncodedTask, Stream
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.results.cautions import cautions
from sapt_jax.results.terminal import make_console
from sapt_jax.run import read_inputs

QUANTILES = (0.5, 0.9, 0.99, 1.0)
SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """What `inspect` found about one task.

    rows: instances of train, dev and test.
    source_lengths, target_lengths: tokens at `QUANTILES`, over all splits.
    cut_sources, cut_targets: shares over all splits.
    answers: (answer, count) of train, most frequent first.
    test_in_train: test instances whose input occurs in train too.
    train_tokens, train_positions: of one epoch's batches, soft prompts among them; the difference is padding.
    """

    name: str
    rows: tuple[int, int, int]
    source_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    cut_sources: float
    cut_targets: float
    answers: tuple[tuple[str, int], ...]
    test_in_train: int
    pseudo_samples: int
    train_tokens: int
    train_positions: int
    problems: tuple[str, ...]


def report_task(task: EncodedTask, train_tokens: int, train_positions: int) -> TaskReport:
    """Counts one task, beside what `Stream.occupancy` says of its training batches."""
    splits = [getattr(task, name) for name in SPLITS]
    lengths = np.concatenate([split.lengths for split in splits])
    quantiles = np.quantile(lengths, QUANTILES, axis=0, method="higher").astype(int)
    seen = {instance.input for instance in task.task.train}
    return TaskReport(
        name=task.name,
        rows=tuple(len(split) for split in splits),
        source_lengths=tuple(quantiles[:, 0].tolist()),
        target_lengths=tuple(quantiles[:, 1].tolist()),
        cut_sources=sum(split.truncated_sources for split in splits) / len(lengths),
        cut_targets=sum(split.truncated_targets for split in splits) / len(lengths),
        answers=tuple(collections.Counter(instance.outputs[0] for instance in task.task.train).most_common()),
        test_in_train=sum(instance.input in seen for instance in task.task.test),
        pseudo_samples=len(task.pseudo) if task.pseudo else 0,
        train_tokens=train_tokens,
        train_positions=train_positions,
        problems=task.task.problems,
    )


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one epoch of training and one pass over dev and test made, soft prompts among it, and in what time."""

    batches: int
    rows: int
    tokens: int
    positions: int
    seconds: float


def full_pass(stream: Stream, *, train_batch_size: int, eval_batch_size: int) -> PassReport:
    """Makes every batch of one epoch of every task and of its dev and test sets, and counts them.

    Of evaluation batches the sources alone count: decoding feeds no targets.
    """
    batches = rows = tokens = positions = 0
    start = time.perf_counter()
    whole, prefetch = Share(0, 1), Prefetch(threads=1, batches=4)
    for index, task in enumerate(stream.tasks):
        epoch = Steps(seed=0, start=0, stop=steps_per_epoch(len(task.train), train_batch_size))
        lesson = make_lesson(index, {index: task.train}, {}, 0.0)
        made = train_batches(lesson, stream.layout(train_batch_size), epoch, whole, prefetch)
        evaluated = [
            {name: batch[name] for name in ("source", "source_mask")}
            for split in (task.dev, task.test)
            for _, batch in eval_batches(split, stream.layout(eval_batch_size), whole)
        ]
        for batch in [*made, *evaluated]:
            masks = [array for name, array in batch.items() if name.endswith("mask")]
            batches += 1
            real = int(batch["source_mask"].any(1).sum())
            rows += real
            tokens += sum(int(mask.sum()) for mask in masks) + stream.prompt_length * real
            positions += sum(mask.size for mask in masks) + stream.prompt_length * len(batch["source"])
    return PassReport(batches, rows, tokens, positions, time.perf_counter() - start)


def _lengths(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _table(reports: Sequence[TaskReport]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption="lengths in tokens at 50%, 90%, 99%, 100%", caption_justify="left")
    table.add_column("task", overflow="fold")
    for column in (
        "train",
        "dev",
        "test",
        "source",
        "target",
        "cut",
        "padding",
        "test in train",
        "pseudo",
        "faulty",
    ):
        table.add_column(column, justify="right")
    for report in reports:
        table.add_row(
            report.name,
            *map(str, report.rows),
            _lengths(report.source_lengths),
            _lengths(report.target_lengths),
            f"{report.cut_sources:.1%} {report.cut_targets:.1%}",
            f"{1 - report.train_tokens / report.train_positions:.1%}",
            str(report.test_in_train),
            str(report.pseudo_samples),
            str(len(report.problems)),
        )
    return table


def _print_example(console: Console, task: EncodedTask, report: TaskReport, tokenizer: Tokenizer) -> None:
    console.rule(task.name, align="left")
    shown = report.answers[:8] if len(report.answers) <= 30 or report.answers[0][1] > 1 else ()
    answers = ", ".join(f"{answer!r} {count}" for answer, count in shown)
    console.print(f"{len(report.answers)} different answers{': ' + answers if answers else ''}")
    unlisted = sorted({answer for answer, _ in report.answers} - set(task.task.labels))
    if task.task.labels and unlisted:
        console.print(f"answers that labels.json does not list: {', '.join(unlisted)}")
    for problem in report.problems[:3]:
        console.print(f"faulty: {problem}")
    for line in cautions(task, tokenizer):
        console.print(f"warning: {line}", style="yellow")
    # The ids that the model gets, as text again, so that a cut shows.
    console.print(tokenizer.decode(task.train.sources[0]), style="dim", end="")
    console.print(f"[answer] {tokenizer.decode(task.train.targets[0])}")


def inspect(config: Any, console: Console) -> tuple[list[TaskReport], PassReport]:
    """Prints the report of a run's config, and returns it. Raises what the run itself would raise."""
    start = time.perf_counter()
    _, tokenizer, stream = read_inputs(config)
    seconds = time.perf_counter() - start
    occupancy = stream.occupancy(config.train.batch_size)
    reports = [report_task(task, *occupancy[task.name]) for task in stream.tasks]
    for task, report in zip(stream.tasks, reports, strict=True):
        _print_example(console, task, report, tokenizer)
    console.print(_table(reports))
    whole = full_pass(stream, train_batch_size=config.train.batch_size, eval_batch_size=config.eval.batch_size)
    train_rows = sum(report.rows[0] for report in reports)
    padding = stream.padding(config.train.batch_size)
    console.print(f"{len(reports)} tasks, {train_rows} training rows, read and tokenised in {seconds:.1f} s")
    console.print(f"{len(stream.buckets)} bucket shapes (source, target): {', '.join(map(str, stream.buckets))}")
    console.print(f"padding of the training batches: {padding:.1%} (batches of {config.train.batch_size})")
    console.print(
        f"one epoch and both held-out sets: {whole.batches} batches, {whole.rows} rows, "
        f"{whole.tokens} tokens, {1 - whole.tokens / whole.positions:.1%} padding, made in {whole.seconds:.1f} s"
    )
    return reports, whole


def main(argv: list[str]) -> None:
    with told_in_one_line():
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}. Settings are --config.NAME=VALUE.")
        check_config(flags.FLAGS.config)
        inspect(flags.FLAGS.config, make_console())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run's settings, a file of configs/.", lock_config=True)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
