"""What a run works with: read and built once from its config, and never changed."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from sapt_jax import sharding, state
from sapt_jax.config import capacity_of, make_method
from sapt_jax.data.batching import Layout
from sapt_jax.data.lesson import check_share
from sapt_jax.data.stream import Stream, load_stream, order_of
from sapt_jax.decoding.answers import Ends
from sapt_jax.methods import Method
from sapt_jax.models.families import load_params, make_model, parameters, read_shape
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.pretrained.tokenizer import Tokenizer, load_tokenizer
from sapt_jax.programs import Programs, make_programs
from sapt_jax.results.curves import RunLog
from sapt_jax.results.figures.catalogue import figures_of
from sapt_jax.results.figures.style import COLUMN
from sapt_jax.results.record import read_record
from sapt_jax.results.terminal import make_console
from sapt_jax.state import Frozen, Task, Trainable, Tree
from sapt_jax.storage import checkpoints, task_folders

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the curves of a run's own tasks are called.
TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that no task changes.

    Attributes:
      config: its settings.
      workdir: where everything that it leaves lies.
      mesh: the devices.
      model: without weights.
      tokenizer, stream: the tasks, and what they were tokenised with.
      method: the continual-learning method.
      programs: its jitted functions.
      log, console: where it tells what happens.
      kind: what its curves are called; a run inside another one has its own.
    """

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    model: nn.Module
    tokenizer: Tokenizer
    stream: Stream
    method: Method
    programs: Programs
    log: RunLog
    console: Console
    kind: str = TRAIN

    @property
    def layout(self) -> Layout:
        """How a split becomes batches when its inputs are answered or measured."""
        return self.stream.layout(self.config.eval.batch_size)

    @property
    def capacity(self) -> int:
        """Slots of the bank."""
        return capacity_of(self.config, self.method, len(self.stream.tasks))

    def folder(self, task_index: int) -> epath.Path:
        """Where the checkpoints of a task lie."""
        folder = task_folders.task_folder(self.workdir, task_index, self.stream.names[task_index])
        return folder if self.kind == TRAIN else folder / self.kind

    def task(self, task_index: int, steps: int = 0, tested: int | None = None) -> Task:
        """What a program is told of a task, on every device.

        Args:
          steps: its number of updates, for programs that train.
          tested: the task that inputs are of, for methods that are told; by default the task itself. With
            config.eval.routing="oracle" any method is told, of the inputs of a test.
        """
        slot_index = self.method.slot_index
        told = self.method.needs_task_id or (tested is not None and self.config.eval.routing == "oracle")
        rows = slot_index(task_index if tested is None else tested) if told else None
        numbers = (task_index, slot_index(task_index), steps, rows)
        return sharding.replicate(Task(*(None if n is None else np.int32(n) for n in numbers)), self.mesh)

    def figures(self, width: float = COLUMN) -> "dict[str, Figure]":
        """Figures of what lies in the workdir so far, `width` inches wide, by name; a notebook shows each as it is."""
        return {name: drawing.figure for name, drawing in figures_of(read_record(self.workdir), width)}

    @property
    def trainable_leaves(self) -> Trainable:
        """The leaves of the trainable tree."""
        return self.method.trainable_leaves(parameters(self.model))

    def frozen_leaves(self, capacity: int) -> Frozen:
        """The leaves of the frozen tree with a bank of `capacity` slots."""
        return self.method.frozen_leaves(parameters(self.model), capacity)

    def empty(self, base: Tree, capacity: int, disabled: tuple[str, ...] = ()) -> Frozen:
        """An empty bank around the pretrained model, less the slots of withdrawn tasks."""
        enabled = np.ones((capacity,), bool)
        for name in disabled:
            enabled[self.method.slot_index(self.stream.names.index(name))] = False
        leaves = self.frozen_leaves(capacity)
        frozen = sharding.create(lambda: state.empty(leaves), leaves, self.mesh)
        return frozen.replace(base=base, enabled=sharding.replicate(enabled, self.mesh))


def read_model(config: ConfigDict) -> tuple[nn.Module, Tokenizer]:
    """The model without its weights, and the tokenizer.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault.
    """
    options = config.model
    shape = read_shape(options.path, options.variant)
    if not (options.tokenizer or options.path):
        raise ValueError('config.model.tokenizer is empty: name one, or "bytes", for a model without a path.')
    model = make_model(shape, options.dtype, options.remat, options.attention, options.dropout)
    # What blocks go on is known before data is read.
    make_method(config).trainable_leaves(parameters(model))
    tokenizer = load_tokenizer(options.tokenizer or resolve_path(options.path)).within(shape.vocab_size)
    if config.data.pad_with_bos:
        if tokenizer.bos_id is None:
            raise ValueError("config.data.pad_with_bos: the tokenizer has no beginning token; set it to False.")
        tokenizer = dataclasses.replace(tokenizer, pad_id=tokenizer.bos_id)
    if 2 * config.eval.beams > shape.vocab_size:
        raise ValueError(
            f"config.eval.beams={config.eval.beams} must be at most {shape.vocab_size // 2}, half of the model's "
            "vocabulary."
        )
    return model, tokenizer


def read_inputs(config: ConfigDict) -> tuple[nn.Module, Tokenizer, Stream]:
    """The model and the tokenizer, as `read_model`, and the tokenised tasks.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault.
    """
    model, tokenizer = read_model(config)
    method = make_method(config)
    num_tasks = len(order_of(config))
    stream = load_stream(
        config,
        tokenizer,
        padding_side=model.padding_side,
        prompt_length=method.prompt_length(capacity_of(config, method, num_tasks)),
        samples=method.samples,
    )
    return model, tokenizer, stream


@contextlib.contextmanager
def open_run(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> Iterator[tuple[Run, Tree]]:
    """Reads model and data, builds the programs, and opens the run's log, which is closed at the end.

    Yields:
      The run, and the base parameters.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault, before anything is changed.
    """
    method, options = make_method(config), config.model
    _check_batch_sizes(config, method, mesh)
    # The data before the weights: these take minutes to load, and a mistake in the data would be told only then.
    model, tokenizer, stream = read_inputs(config)
    ends = Ends(config.eval.max_new_tokens, tokenizer.eos_id, tokenizer.pad_id)
    programs = make_programs(config, model, method, mesh, ends)
    base = load_params(model, options.path, options.param_dtype, mesh, config.seed)
    console = make_console()
    console.quiet = jax.process_index() != 0
    with RunLog(workdir, stand=_stand(workdir, stream.names, method)) as log:
        yield Run(config, workdir, mesh, model, tokenizer, stream, method, programs, log, console), base


def _check_batch_sizes(config: ConfigDict, method: Method, mesh: Mesh) -> None:
    sizes = {
        "train.batch_size / accumulation": config.train.batch_size // config.train.accumulation,
        "eval.batch_size": config.eval.batch_size,
    }
    if config.pseudo_samples.source == "generate" and method.samples:
        sizes["pseudo_samples.writer.batch_size"] = config.pseudo_samples.writer.batch_size
    sharding.check_batch_sizes(sizes, mesh)
    if method.replay:
        check_share(method.replay, config.train.batch_size, config.train.accumulation)


def _stand(workdir: epath.Path, names: tuple[str, ...], method: Method) -> list[tuple[str, float]] | None:
    """How far each task's curves stand: its name, and the last step that is saved; None for a new run."""
    last: dict[int, float] = {}
    for together in method.lessons(len(names)):
        folder = task_folders.task_folder(workdir, together[-1], names[together[-1]])
        step = math.inf if checkpoints.has_committed(folder) else checkpoints.latest_step(folder)
        last |= dict.fromkeys(together, step)
    return [(name, last[index]) for index, name in enumerate(names)] if any(last.values()) else None
