"""The two state trees of continual learning, declared leaf by leaf, and the named streams of random numbers."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

TASKS = "tasks"

# A nested dict of arrays, or of what stands for them.
Tree = Any


class Declared(Protocol):
    """Anything that says an array's shape and the logical axis of each of its dimensions."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str | None, ...]: ...


# The base model's parameters, by path joined with "/".
Parameters = Mapping[str, Declared]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array that a run keeps beside the base model: how it is made, placed, stored and grown.

    Attributes:
      shape: its shape.
      axes: the logical axis of each dimension, see `sharding.RULES`. One named "tasks" has an entry for each slot of
        the bank, and grows with it.
      init: (rng, base) -> the array at the start of a task; None where it starts from zero.
      task_axis: for a leaf of a block, where its array in the bank has the axis "tasks".
      dtype: of the array.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[jax.Array, Tree], jax.Array] | None = None
    task_axis: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.axes) != len(self.shape):
            raise ValueError(f"an array of shape {self.shape} cannot have the logical axes {self.axes}")

    def start(self, rng: jax.Array, base: Tree) -> jax.Array:
        """The array as it begins."""
        return jnp.zeros(self.shape, self.dtype) if self.init is None else self.init(rng, base)

    def in_bank(self, capacity: int) -> "Leaf":
        """The bank's array of this leaf of a block: `capacity` of them, empty."""
        place = self.task_axis
        if place is None:
            raise ValueError(f"a block's array of shape {self.shape} does not say where the bank has its task axis")
        return Leaf(
            (*self.shape[:place], capacity, *self.shape[place:]), (*self.axes[:place], TASKS, *self.axes[place:])
        )


def width_of(parameters: Parameters) -> int:
    """The model's width D, that of its token embeddings."""
    return parameters["token_embedder/embedding"].shape[1]


def is_leaf(x: Any) -> bool:
    """Whether this is a declaration, for `jax.tree.map` over trees of them."""
    return isinstance(x, Leaf)


def declare(module: nn.Module, *inputs: Any) -> Tree:
    """The parameters of a Linen module as leaves: shapes, inits and logical axes as the module says.

    Args:
      inputs: arrays or `jax.ShapeDtypeStruct`s that it is called with.
    """

    def init(rng: jax.Array) -> Tree:
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        return module.init(rng, *example)["params"]

    boxed = jax.eval_shape(init, jax.random.key(0))

    def leaf(path: tuple, box: Any) -> Leaf:
        def start(rng: jax.Array, base: Tree) -> jax.Array:
            return functools.reduce(lambda tree, key: tree[key.key], path, nn.meta.unbox(init(rng)))

        if not isinstance(box, nn.Partitioned):
            raise ValueError(f"{type(module).__name__}: {jax.tree_util.keystr(path)} has no logical axes")
        return Leaf(box.value.shape, tuple(box.names), start)

    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


class Frozen(struct.PyTreeNode):
    """Everything that the current task must not change. T is the capacity of the bank.

    Attributes:
      base: the pretrained model's parameters.
      bank: PET blocks of all task slots (see `pet`), zero in slots not yet written.
      enabled: [T] bool, False on tasks withdrawn from the mixture.
      memory: what the method keeps between tasks, see `Method.memory`.
    """

    base: Tree
    bank: Tree
    enabled: Any
    memory: Tree


class Trainable(struct.PyTreeNode):
    """What the current task trains: its block, and what the method learns to choose blocks with."""

    slot: Tree
    selector: Tree


class TrainState(struct.PyTreeNode):
    """What a step changes: the trainable tree, the optimizer's state, and the number of steps done in this task."""

    trainable: Trainable
    opt_state: Tree
    step: jax.Array


class Task(struct.PyTreeNode):
    """What a program needs to know of the task at hand; integers, traced, so that all tasks share one program.

    Attributes:
      index: [] place in the sequence, from 0.
      slot: [] the slot that it trains.
      steps: [] its number of updates; 0 where nothing is trained.
      rows: [] or [B] the slot of the task that each row of the batch is of, for methods that are told; else None.
      step: [] updates of the task done before, inside a training step; else None.
    """

    index: jax.Array
    slot: jax.Array
    steps: jax.Array
    rows: jax.Array | None = None
    step: jax.Array | None = None


def abstract(leaves: Tree) -> Tree:
    """A tree of leaves as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves, is_leaf=is_leaf)


def empty(leaves: Tree) -> Tree:
    """The arrays of a tree of leaves, all zero."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), leaves, is_leaf=is_leaf)


def start(rng: jax.Array, leaves: Tree, base: Tree) -> Tree:
    """The arrays of a tree of leaves as they begin, each from random numbers of its own."""
    flat, treedef = jax.tree.flatten(leaves, is_leaf=is_leaf)
    arrays = [leaf.start(jax.random.fold_in(rng, number), base) for number, leaf in enumerate(flat)]
    return jax.tree.unflatten(treedef, arrays)


def bank_of(block: Tree, capacity: int) -> Tree:
    """The bank's leaves of a block's leaves."""
    return jax.tree.map(lambda leaf: leaf.in_bank(capacity), block, is_leaf=is_leaf)


def grow(frozen: Frozen, declared: Frozen) -> Frozen:
    """Bank and memory with empty entries appended up to the declared shapes; nothing already learned changes.

    Args:
      declared: leaves at the new capacity.
    """

    def append(array: jax.Array, leaf: Leaf) -> jax.Array:
        if array.shape == leaf.shape:
            return array
        return jnp.pad(array, [(0, new - old) for new, old in zip(leaf.shape, array.shape, strict=True)])

    return frozen.replace(
        bank=jax.tree.map(append, frozen.bank, declared.bank),
        memory=jax.tree.map(append, frozen.memory, declared.memory),
        enabled=jnp.pad(frozen.enabled, (0, declared.enabled.shape[0] - frozen.enabled.shape[0]), constant_values=True),
    )


def active_slots(frozen: Frozen, task: Task) -> jax.Array:
    """[T] bool: slots learned so far, the current one included, less those withdrawn."""
    return (jnp.arange(frozen.enabled.shape[0]) <= task.slot) & frozen.enabled


def earlier_slots(frozen: Frozen, task: Task) -> jax.Array:
    """[T] bool: slots of earlier tasks, less those withdrawn."""
    return (jnp.arange(frozen.enabled.shape[0]) < task.slot) & frozen.enabled


def rng(seed: int, name: str, task: Any = 0, step: Any = 0) -> jax.Array:
    """The random key of one use: the stream `name`, at a step of a task. `task` and `step` may be traced.

    JAX's `split(key, n)[i]` equals `fold_in(key, i)`, so a key that two uses share, or that one of them has split,
    gives both the same numbers. Keys of this function all lie equally deep under names of their own.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(jax.random.fold_in(key, task), step)


def host_rng(seed: int, name: str, task: int = 0, step: int = 0) -> np.random.Generator:
    """As `rng`, for numpy on the host."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), task, step])
