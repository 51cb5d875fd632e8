"""What a run learned: read from its workdir, and written as a workdir that `sapt_jax.main` goes on with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from sapt_jax import state
from sapt_jax.config import (
    capacity_of,
    default_config,
    make_method,
    unknown_fields,
    wrong_values,
)
from sapt_jax.data.benchmarks import BENCHMARKS
from sapt_jax.data.stream import disabled_of, order_of
from sapt_jax.export.sites import base_parameters
from sapt_jax.methods import Method
from sapt_jax.models.families import read_shape
from sapt_jax.pseudo_samples.written_samples import pool_file
from sapt_jax.recorded_config import record_config, upgrade
from sapt_jax.state import TASKS, Frozen, Leaf, Task, Trainable, Tree, is_leaf
from sapt_jax.storage import checkpoints, task_folders
from sapt_jax.storage.new_folder import new_folder
from sapt_jax.storage.text_files import read_json

_SUM_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a run has learned so far, in numpy arrays.

    Attributes:
      config: the run's settings.
      shape: the base model's.
      tasks: names of the committed tasks, in order.
      slots: for each slot of the bank, the task that trained it last.
      frozen: after the last task, without the base model and cut to `slots`; withdrawn tasks are not `enabled`.
      trainables: what each task ended with.
      pools: the file of each task's pseudo-samples, of the tasks that have some of their own writing.
    """

    config: ConfigDict
    shape: Any
    tasks: tuple[str, ...]
    slots: tuple[str, ...]
    frozen: Frozen
    trainables: tuple[Trainable, ...]
    pools: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The run's method."""
        return make_method(self.config)

    def weights_of(self, task: str) -> np.ndarray:
        """The mixture [T] of one task's block alone.

        Raises:
          ValueError: the run has no block of it, or from `check_linear`.
        """
        self.check_linear()
        if task not in self.slots:
            raise ValueError(f"the run has no block of task {task!r}; it has {', '.join(self.slots)}")
        return np.eye(len(self.slots), dtype=np.float32)[self.slots.index(task)]

    def mixture(self, weights: Sequence[float] | None) -> np.ndarray:
        """A mixture [T] in float32.

        Args:
          weights: one for each slot; None is what the method gives every input, where it has such weights.

        Raises:
          ValueError: not one weight for each slot, a negative one, or they do not sum to one and the method does not
            sum its blocks; no weights, and the method mixes anew for each input; or from `check_linear`.
        """
        self.check_linear()
        mixing, names = self.method.mixing, ", ".join(self.slots)
        if weights is None:
            if mixing == "one":
                return np.ones(1, np.float32)
            if mixing == "sum":
                return self.frozen.enabled.astype(np.float32)
            raise ValueError(
                f"config.method={self.config.method!r} mixes its blocks anew for each input: give --weights, one for "
                f"each of {names}; --help shows an example"
            )
        if len(weights) != len(self.slots):
            raise ValueError(f"{len(weights)} weights for {len(self.slots)} blocks: give one for each of {names}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"the weights {', '.join(map(str, weights))} must not be negative")
        if mixing not in ("sum", "gated") and abs(sum(weights) - 1) > _SUM_TOLERANCE:
            raise ValueError(f"the weights sum to {sum(weights):g}, and must sum to 1")
        return np.asarray(weights, np.float32)

    def check_linear(self) -> None:
        """Checks that the run's blocks are mixed by adding them up under weights.

        Raises:
          ValueError: the method has a mixture of its own.
        """
        if self.method.uses("mixture") and self.method.mixing == "routed":
            raise ValueError(
                f"config.method={self.config.method!r} does more with its blocks than add them up under weights, which "
                "no adapter and no weight can hold"
            )


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a task left.

    Attributes:
      trainable: what it ended with.
      target: of SAPT, its recorded attention on the slots up to its own.
    """

    trainable: Trainable
    target: np.ndarray | None = None


def read_run(workdir: Path, base: str = "") -> Learned:
    """Reads what the run in `workdir` has learned.

    Args:
      base: where the base model lies now, if not where the run found it.

    Raises:
      FileNotFoundError: this is no run's workdir, it has learned nothing yet, or its base model has gone.
      ValueError: the base is another model, or the run's settings are not understood.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{workdir} has no config.json: give the --workdir of a run of sapt_jax.main")
    config = read_config(read_json(file, "Put a whole copy back."), str(file))
    shape = read_base_shape(config, base)
    folders = checkpoints.committed_folders(workdir)
    if not folders:
        raise FileNotFoundError(f"{workdir} has no committed task yet: let the run finish its first one")
    tasks = tuple(folder.name.split("-", 1)[1] for folder in folders)
    slots = slot_names(make_method(config), tasks)
    trainables = []
    try:
        # Of the frozen trees the last has all that the others have.
        for folder in folders:
            last, trainable = _read_task(config, shape, folder)
            trainables.append(trainable)
    except checkpoints.DamagedError:
        raise
    except ValueError as error:
        where = f"--base={base}" if base else f"{config.model.path or config.model.variant} (config.model.path)"
        raise ValueError(
            f"{where} is not the model that this run was trained on, or the run is damaged: {error}"
        ) from None
    disabled = disabled_of(config)
    enabled = np.array([name not in disabled for name in slots])
    declared, _ = declared_state(config, shape, len(slots))
    bank, memory = (_cut(getattr(last, name), getattr(declared, name)) for name in ("bank", "memory"))
    frozen = Frozen(base=None, bank=bank, enabled=enabled, memory=memory)
    benchmark = BENCHMARKS[config.benchmark].folder
    pools = {task: pool_file(folder, benchmark, task) for task, folder in zip(tasks, folders, strict=True)}
    written = {task: file for task, file in pools.items() if file.is_file()}
    return Learned(config, shape, tasks, slots, frozen, tuple(trainables), written)


def write_run(config: ConfigDict, shape: Any, ended: Mapping[str, Ended], workdir: Path) -> None:
    """Writes a workdir as if the run of this config had just committed these tasks.

    Args:
      ended: the first tasks of config.task_order by name, in order.

    Raises:
      FileExistsError: the workdir exists.
      ValueError: the tasks are not the first of config.task_order, or what they left are no numbers or no weights.
    """
    for name, task in ended.items():
        _check_numbers(name, task)
    order = order_of(config)
    if order[: len(ended)] != tuple(ended):
        raise ValueError(f"config.task_order begins with {', '.join(order)}, the tasks are {', '.join(ended)}")
    method = make_method(config)
    capacity = capacity_of(config, method, len(order))
    declared, _ = declared_state(config, shape, capacity)
    frozen = state.empty(declared).replace(enabled=jnp.ones((capacity,), bool))
    with new_folder(workdir) as unfinished:
        for index, (name, task) in enumerate(ended.items()):
            target = task.target
            found = None if target is None else {"target": np.pad(target, (0, capacity - len(target)))}
            trainable = jax.tree.map(jnp.asarray, task.trainable)
            place = Task(np.int32(index), np.int32(method.slot_index(index)), np.int32(0))
            frozen = method.end_task(frozen, trainable, found, place)
            checkpoints.save_committed(task_folders.task_folder(unfinished, index, name), frozen, trainable)
        record_config(config, unfinished)


def _check_numbers(name: str, ended: Ended) -> None:
    if not all(np.isfinite(array).all() for array in jax.tree.leaves(ended.trainable)):
        raise ValueError(f"{name}: its block, key or query projection holds NaN or infinity. Take a whole copy.")
    target = ended.target
    # In bfloat16 a mean of weights is a hundredth off.
    if target is not None and not (np.all(target >= 0) and abs(target.sum() - 1) < 0.05):
        raise ValueError(f"{name}: its recorded attention {target.tolist()} is not weights that sum to 1.")


def read_config(flat: Mapping[str, Any], where: str) -> ConfigDict:
    """The config of a run from its config.json, of this version or an older one; what it lacks has its default.

    Raises:
      ValueError: it has fields that are no settings, or values that they do not take.
    """
    now = {name: _with_tuples(value) for name, value in upgrade(flat).items()}
    if problems := unknown_fields(now) or wrong_values(now):
        raise ValueError(f"{where} is not the config.json of a run: {problems[0]}")
    config = default_config()
    config.update_from_flattened_dict(now)
    return config


def read_base_shape(config: ConfigDict, base: str) -> Any:
    """The shape of a run's base model, which lies at `base` if that is not "": config.model.path then becomes it.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is no model of a known architecture.
    """
    if base:
        config.model.path = base
    try:
        return read_shape(config.model.path, config.model.variant)
    except FileNotFoundError as error:
        hint = "" if base else ". --base=PATH says where the base model lies now."
        raise FileNotFoundError(f"{error}{hint}") from None


def slot_names(method: Method, tasks: Sequence[str]) -> tuple[str, ...]:
    """For each slot that these tasks trained, the name of the last that did."""
    by_slot = {method.slot_index(index): name for index, name in enumerate(tasks)}
    return tuple(by_slot[slot] for slot in sorted(by_slot))


def declared_state(config: ConfigDict, shape: Any, capacity: int) -> tuple[Frozen, Trainable]:
    """The leaves of the two state trees, without a base model."""
    method, parameters = make_method(config), base_parameters(shape)
    return method.frozen_leaves(parameters, capacity), method.trainable_leaves(parameters)


def _read_task(config: ConfigDict, shape: Any, folder: Path) -> tuple[Frozen, Trainable]:
    """What a committed task's checkpoint holds, in numpy arrays; `enabled` is not among it."""
    declared, _ = declared_state(config, shape, 1)
    capacity = checkpoints.saved_capacity(folder, declared)
    frozen, trainable = _on_this_machine(declared_state(config, shape, capacity))
    frozen, trainable = checkpoints.load_committed(folder, frozen, trainable)
    return jax.tree.map(np.asarray, (frozen.replace(enabled=None), trainable))


def _on_this_machine(leaves: Tree) -> Tree:
    # A run on many accelerators is read where there is none.
    sharding = SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), leaves, is_leaf=is_leaf
    )


def _cut(arrays: Tree, declared: Tree) -> Tree:
    """Arrays with as many slots as they are declared with."""

    def cut(array: np.ndarray, leaf: Leaf) -> np.ndarray:
        sizes = (size if axis == TASKS else None for size, axis in zip(leaf.shape, leaf.axes, strict=True))
        return array[tuple(slice(size) for size in sizes)]

    return jax.tree.map(cut, arrays, declared)


def _with_tuples(value: Any) -> Any:
    """A value as settings have it: JSON knows no tuples."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value
