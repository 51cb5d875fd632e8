"""Rule tables between our parameter tree and another program's tensors, read in both directions.

A table has one rule for each of our parameters. Loading demands that rules, file and model match one to one:
what is missing, unused or of the wrong shape is reported together, before a single tensor is read.
"""

import dataclasses
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[slice | np.ndarray, ...]


class Source(Protocol):
    """Tensors that are read piece by piece."""

    label: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the name and shape of every tensor, without reading any."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a part of a tensor. The index of axis 0 may be an array of positions, the rest are slices."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A source over anything with `shape` and numpy's indexing: arrays, memory maps, TensorStore handles.

    Attributes:
      label: the file or folder, for messages.
      arrays: the tensors by name.
    """

    label: str
    arrays: Mapping[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        return np.asarray(self.arrays[name][index])


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """How one of our parameters is stored elsewhere.

    Attributes:
      path: our parameter, its names joined by `/`.
      name: the foreign tensor. With `{layer}` in it, our parameter is a stack over axis 0 of one tensor per
        layer, and `axes` and `order` speak of a single layer.
      axes: ours is the foreign tensor transposed by these axes; None keeps them.
      order: ours is the foreign tensor with its axis 0 in this order (before `axes`); None keeps it.
      other_names: what the foreign tensor may be called instead; a source that holds none of tensors which share
        memory but one may have kept any.
    """

    path: str
    name: str
    axes: tuple[int, ...] | None = None
    order: np.ndarray | None = None
    other_names: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def names(self, shape: Sequence[int]) -> list[str]:
        """Returns the foreign names that make up our parameter of this shape, in the order of the layers."""
        if not self.stacked:
            return [self.name]
        return [self.name.replace("{layer}", str(layer)) for layer in range(shape[0])]

    def foreign_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape that each foreign tensor must have for our parameter of this shape."""
        single = tuple(shape[1:] if self.stacked else shape)
        return single if self.axes is None else tuple(single[axis] for axis in np.argsort(self.axes))

    def foreign_index(self, index: Sequence[slice]) -> Index:
        """Returns what to read of a foreign tensor to get this part of (a layer of) our parameter."""
        foreign: list[slice | np.ndarray] = list(index)
        if self.axes is not None:
            foreign = [index[axis] for axis in np.argsort(self.axes)]
        if self.order is not None:
            foreign[0] = self.order[foreign[0]]
        return tuple(foreign)

    def to_ours(self, part: np.ndarray) -> np.ndarray:
        """Turns what was read at `foreign_index` into our layout."""
        return part if self.axes is None else part.transpose(self.axes)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        """Turns (a layer of) our whole parameter into the foreign tensor, a view where the order is kept."""
        if self.axes is not None:
            array = array.transpose(np.argsort(self.axes))
        return array if self.order is None else array[np.argsort(self.order)]


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one architecture in one format.

    Attributes:
      rules: one for each of our parameters.
      ignore: regular expressions of foreign names that carry no information of their own (buffers, tied
        copies).
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    def by_path(self, stored: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Rule]:
        """The rules, each under the name that a source has, where it may have several."""
        rules = {}
        for rule in self.rules:
            others = [] if rule.name in stored else [name for name in rule.other_names if name in stored]
            rules[rule.path] = dataclasses.replace(rule, name=others[0]) if others else rule
        return rules


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """One of our parameters as a source stores it, not yet read.

    Attributes:
      source: the foreign tensors.
      rule: how the parameter is stored there.
      shape: ours.
      dtype: what its values are to become; `read` leaves them as they are stored.
    """

    source: Source
    rule: Rule
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Where each foreign tensor that makes it up belongs: (layer,) of each layer, or () once."""
        return [(layer,) for layer in range(self.shape[0])] if self.rule.stacked else [()]

    def read(self, place: tuple[int, ...]) -> np.ndarray:
        """Reads what belongs at a place, whole and in our layout, in the dtype that it is stored in."""
        name = self.rule.names(self.shape)[place[0] if place else 0]
        return _read(self.source, self.rule, name, [(0, size) for size in self.shape[len(place) :]])


def check(source: Source, table: Table, shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that table, source and model match one to one.

    Args:
      source: the foreign tensors.
      table: the rules; those whose path the model lacks are passed over (such as the head of a tied model).
      shapes: the model's parameters, by path.

    Raises:
      ValueError: lists every key that is missing, unused or mis-shaped, and names the source.
    """
    stored = source.shapes()
    rules = table.by_path(stored)
    missing, misshaped, used = [], [], set()
    for path, shape in shapes.items():
        if path not in rules:
            missing.append(f"{path} {tuple(shape)}: this format has no tensor for it")
            continue
        want = rules[path].foreign_shape(shape)
        for name in rules[path].names(shape):
            used.add(name)
            if name not in stored:
                missing.append(f"{name} {want} for {path}")
            elif stored[name] != want:
                misshaped.append(f"{name} is {stored[name]}, the model needs {want} for {path}")
    unused = [
        f"{name} {shape}"
        for name, shape in stored.items()
        if name not in used and not any(re.fullmatch(pattern, name) for pattern in table.ignore)
    ]
    problems = {"missing": missing, "unused": unused, "of the wrong shape": misshaped}
    if any(problems.values()):
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in problems.items() if lines)
        lines = [f"  {kind}: {line}" for kind, entries in problems.items() for line in entries]
        raise ValueError(
            f"{source.label} does not hold the weights of this model ({counts}). "
            "Compare the model's config with the file's.\n" + "\n".join(lines)
        )


def identity(names: Iterable[str]) -> Table:
    """Returns the table of a source that keeps our parameters as they are, under our paths."""
    return Table(tuple(Rule(name, name) for name in names))


def open_parameters(source: Source, table: Table, target: Mapping[str, Any]) -> dict[str, Parameter]:
    """Finds every parameter of a tree in a source, by its path; nothing is read.

    Args:
      source: the foreign tensors.
      table: their rules.
      target: the wanted tree, of leaves with a shape and the wanted dtype.

    Raises:
      ValueError: from `check`.
    """
    leaves = flax.traverse_util.flatten_dict(target, sep="/")
    check(source, table, {path: leaf.shape for path, leaf in leaves.items()})
    rules = table.by_path(source.shapes())
    return {
        path: Parameter(source, rules[path], tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves.items()
    }


def load(source: Source, table: Table, target: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a parameter tree from foreign tensors, one parameter at a time.

    Each process reads only the parts that its devices hold, and waits until they are there, so host memory
    holds one parameter beside what is already on the devices.

    Args:
      source: the foreign tensors.
      table: their rules.
      target: the wanted tree, with jax.ShapeDtypeStruct leaves. A leaf's `sharding`, where given, says where
        its array goes; else it goes to the default device. Values are cast to the leaf's dtype.

    Returns:
      The same tree with jax arrays.

    Raises:
      ValueError: from `check`.
    """
    parameters = open_parameters(source, table, target)
    leaves = flax.traverse_util.flatten_dict(target, sep="/")
    arrays = {
        path: jax.block_until_ready(_load(parameter, getattr(leaves[path], "sharding", None)))
        for path, parameter in parameters.items()
    }
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def to_foreign(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """Writes a parameter tree as foreign tensors: the inverse of `load`, bit for bit where dtypes agree.

    Args:
      params: our tree of arrays, each fully addressable by this process.
      table: the rules.

    Returns:
      numpy arrays by foreign name, contiguous in memory and in our dtypes.

    Raises:
      ValueError: lists the parameters that the table has no rule for.
    """
    tensors = foreign_tensors(flax.traverse_util.flatten_dict(params, sep="/"), table)
    return {name: np.ascontiguousarray(array) for name, array, _ in tensors}


def foreign_tensors(params: Mapping[str, Any], table: Table) -> Iterator[tuple[str, np.ndarray, np.dtype]]:
    """Writes a parameter tree as foreign tensors, one after another, of which one is in memory.

    Args:
      params: arrays or `Parameter`s, by path.
      table: the rules.

    Yields:
      The foreign name, the tensor as it is stored, and the dtype that its values are to become.

    Raises:
      ValueError: lists the parameters that the table has no rule for.
    """
    rules = table.by_path()
    if unknown := sorted(set(params) - set(rules)):
        raise ValueError(f"this format has no tensor for: {', '.join(unknown)}")
    for path, leaf in params.items():
        rule, names = rules[path], rules[path].names(leaf.shape)
        for place in leaf.places if isinstance(leaf, Parameter) else [()]:
            piece = leaf.read(place) if isinstance(leaf, Parameter) else np.asarray(leaf)
            stack = rule.stacked and not place
            for layer, array in enumerate(piece) if stack else [(place[0] if place else 0, piece)]:
                yield names[layer], rule.to_foreign(array), np.dtype(leaf.dtype)
            del piece, array  # before the next is read


def _load(parameter: Parameter, sharding: Any) -> jax.Array:
    source, rule, shape = parameter.source, parameter.rule, parameter.shape
    whole = tuple(slice(None) for _ in shape)
    indices = [whole] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
    bounds = {_bounds(index, shape) for index in indices}
    shards = {bound: np.empty([stop - start for start, stop in bound], parameter.dtype) for bound in bounds}
    # Layers outside, shards inside: a source that must decode a whole tensor to read a part decodes each
    # once.
    for layer, name in enumerate(rule.names(shape)):
        for bound, shard in shards.items():
            if not rule.stacked:
                shard[...] = _read(source, rule, name, bound)
            elif bound[0][0] <= layer < bound[0][1]:
                shard[layer - bound[0][0]] = _read(source, rule, name, bound[1:])
    if sharding is None:
        return jnp.asarray(shards[_bounds(whole, shape)])
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index, shape)])


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _read(source: Source, rule: Rule, name: str, bound: Sequence[tuple[int, int]]) -> np.ndarray:
    part = source.read(name, rule.foreign_index([slice(*ends) for ends in bound]))
    if not jnp.issubdtype(part.dtype, jnp.floating):
        raise ValueError(
            f"{source.label}: tensor {name} is of type {part.dtype}: whole numbers are weights only with scales that "
            "are not read here. Give the weights as they were before they were quantised."
        )
    if not np.isfinite(part).all():
        raise ValueError(f"{source.label}: tensor {name} holds NaN or infinite weights. Fetch or save the model anew.")
    return rule.to_ours(part)
