"""What a run learned: read from its workdir, and written as a workdir that `sapt_jax.main` goes on with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from configs import common
from sapt_jax.config import record_config, unknown_fields
from sapt_jax.data.benchmarks import resolve_task_order
from sapt_jax.export.sites import pet_sites
from sapt_jax.methods.base import Method
from sapt_jax.models.families import read_shape
from sapt_jax.pet import TASK_AXIS
from sapt_jax.pretrained.hf import read_json
from sapt_jax.run import make_method
from sapt_jax.state import Frozen, Trainable, commit, init_frozen
from sapt_jax.storage import checkpoints
from sapt_jax.storage.new_folder import new_folder

# Those whose bank, keys and query projection are all that a mixture needs.
METHODS = ("sapt", "seq_lora")
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
    """

    config: ConfigDict
    shape: Any
    tasks: tuple[str, ...]
    slots: tuple[str, ...]
    frozen: Frozen
    trainables: tuple[Trainable, ...]

    def weights_of(self, task: str) -> np.ndarray:
        """The mixture [T] of one task's block alone.

        Raises:
          ValueError: the run has no block of it.
        """
        if task not in self.slots:
            raise ValueError(f"the run has no block of task {task!r}; it has {', '.join(self.slots)}")
        return np.eye(len(self.slots), dtype=np.float32)[self.slots.index(task)]

    def check_weights(self, weights: Sequence[float]) -> np.ndarray:
        """A mixture [T] in float32.

        Raises:
          ValueError: not one weight for each slot, a negative one, or they do not sum to one.
        """
        if len(weights) != len(self.slots):
            raise ValueError(
                f"{len(weights)} weights for {len(self.slots)} blocks: give one for each of {', '.join(self.slots)}"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"the weights {', '.join(map(str, weights))} must not be negative")
        if abs(sum(weights) - 1) > _SUM_TOLERANCE:
            raise ValueError(f"the weights sum to {sum(weights):g}, and must sum to 1")
        return np.asarray(weights, np.float32)


def read_run(workdir: Path, base: str = "") -> Learned:
    """Reads what the run in `workdir` has learned.

    Args:
      base: where the base model lies now, if not where the run found it.

    Raises:
      FileNotFoundError: this is no run's workdir, it has learned nothing yet, or its base model has gone.
      ValueError: the base is another model, or the run's method cannot leave.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{workdir} has no config.json: give the --workdir of a run of sapt_jax.main")
    config = read_config(read_json(file), str(file))
    shape = read_base_shape(config, base)
    folders = [folder for folder in (workdir / "tasks").glob("[0-9]*-*") if checkpoints.has_committed(folder)]
    folders.sort(key=lambda folder: int(folder.name.split("-", 1)[0]))
    if not folders:
        raise FileNotFoundError(f"{workdir} has no committed task yet: let the run finish its first one")
    tasks = tuple(folder.name.split("-", 1)[1] for folder in folders)
    method, trainables = make_method(config), []
    for folder in folders:
        frozen, trainable = _abstract(method, shape, checkpoints.saved_capacity(folder))
        try:
            frozen, trainable = checkpoints.load_committed(folder, frozen, trainable)
        except ValueError as error:
            where = f"--base={base}" if base else f"{config.model.path or config.model.variant} (config.model.path)"
            raise ValueError(
                f"{where} is not the model that this run was trained on, or the run is damaged: {error}"
            ) from None
        trainables.append(jax.tree.map(np.asarray, trainable))
    slots = slot_names(method, tasks)
    frozen = _cut(jax.tree.map(np.asarray, frozen.replace(enabled=None)), len(slots))
    disabled = resolve_task_order(config.disabled_tasks, config.benchmark) if config.disabled_tasks else ()
    frozen = frozen.replace(enabled=np.array([name not in disabled for name in slots]))
    return Learned(config, shape, tasks, slots, frozen, tuple(trainables))


def write_run(
    config: ConfigDict,
    shape: Any,
    tasks: Sequence[str],
    trainables: Sequence[Trainable],
    targets: Sequence[np.ndarray],
    workdir: Path,
) -> None:
    """Writes a workdir as if the run of this config had just committed these tasks.

    Args:
      tasks: the first ones of config.task_order.
      trainables: what each task ended with.
      targets: for each task, its recorded attention on the slots up to its own.

    Raises:
      FileExistsError: the workdir exists.
      ValueError: the tasks are not the first of config.task_order.
    """
    order = resolve_task_order(config.task_order, config.benchmark)
    if order[: len(tasks)] != tuple(tasks):
        raise ValueError(f"config.task_order begins with {', '.join(order)}, the tasks are {', '.join(tasks)}")
    method = make_method(config)
    capacity = method.capacity(max(len(order), config.pet.capacity))
    frozen = init_frozen(None, method.pet, pet_sites(shape), shape.d_model, capacity)
    with new_folder(workdir) as unfinished:
        for index, (name, trainable, target) in enumerate(zip(tasks, trainables, targets, strict=True)):
            target = np.pad(np.asarray(target, np.float32), (0, capacity - len(target)))
            trainable = jax.tree.map(jnp.asarray, trainable)
            frozen = commit(frozen, trainable, jnp.asarray(target), np.int32(method.slot_index(index)))
            checkpoints.save_committed(checkpoints.task_folder(unfinished, index, name), frozen, trainable)
        record_config(config, unfinished)


def read_config(flat: Mapping[str, Any], where: str) -> ConfigDict:
    """The config of a run from its config.json; settings that this one lacks are those of configs/common.py.

    Raises:
      ValueError: it has fields that are no settings, or its method is not of `METHODS`.
    """
    if problems := unknown_fields(flat):
        raise ValueError(f"{where} is not the config.json of a run: {problems[0]}")
    config = common.get_config()
    config.update_from_flattened_dict(dict(flat))
    if config.method not in METHODS:
        raise ValueError(f"{where}: config.method={config.method!r} cannot be converted; {' and '.join(METHODS)} can")
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


def abstract_state(config: ConfigDict, shape: Any, capacity: int) -> tuple[Frozen, Trainable]:
    """Shapes and dtypes of the two state trees, without a base model."""
    return _abstract(make_method(config), shape, capacity)


def _abstract(method: Method, shape: Any, capacity: int) -> tuple[Frozen, Trainable]:
    sites = pet_sites(shape)

    def init(rng, table):
        frozen = init_frozen(None, method.pet, sites, shape.d_model, capacity)
        return frozen, method.open_task(rng, sites, table, None)

    table = jax.ShapeDtypeStruct((shape.vocab_size, shape.d_model), np.float32)
    # A run on many accelerators is read where there is none.
    sharding = SingleDeviceSharding(jax.devices("cpu")[0])
    shapes = jax.eval_shape(init, jax.random.key(0), table)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _cut(frozen: Frozen, slots: int) -> Frozen:
    bank = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.take(leaf, range(slots), TASK_AXIS[path[-1].key]), frozen.bank
    )
    return frozen.replace(bank=bank, keys=frozen.keys[:slots], targets=frozen.targets[:slots, :slots])
