"""The device mesh, the rules from logical to mesh axes, and where arrays go."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, Any], ...]

# Logical axis -> mesh axis; `config.mesh.rules` may replace each. An array with an axis without one is an error.
RULES: Rules = (
    ("batch", BATCH_AXES),
    ("length", None),
    ("act_embed", None),
    ("layers", None),
    ("norm", None),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    # PET blocks: LoRA's two factors follow the matrices that they are added to.
    ("tasks", None),
    ("rank", None),
    ("prompt", None),
    # The shared attention is small: every device holds all of it.
    ("query", None),
    ("query_hidden", None),
    ("samples", None),
)

# Logical axes of activations.
STATES = ("batch", "length", "act_embed")
QUERY = ("batch", "length", "heads", "head_dim")
KEY_VALUE = ("batch", "length", "kv_heads", "head_dim")
CACHE = ("layers", *KEY_VALUE)
CROSS_CACHE = ("layers", "batch", "kv_heads", "head_dim", "length")
HIDDEN = ("batch", "length", "mlp")
LOGITS = ("batch", "length", "vocab")


def make_rules(overrides: Sequence[tuple[str, Any]]) -> Rules:
    """`RULES` with those in `overrides` (config.mesh.rules) in place of the ones of the same names.

    Raises:
      ValueError: names every override that is no (logical axis, mesh axis or axes or None).
    """
    known = dict(RULES)
    problems = []
    for rule in overrides:
        pair = isinstance(rule, list | tuple) and len(rule) == 2
        # Batches reach the devices before any program runs: where they go is fixed.
        if not pair or rule[0] not in known or rule[0] == "batch" or not set(_mesh_axes(rule[1])) <= set(AXES):
            problems.append(repr(rule))
    if problems:
        raise ValueError(
            f"config.mesh.rules: {', '.join(problems)} cannot be. A rule is a pair of one of "
            f"{', '.join(name for name in known if name != 'batch')} and one or several of {', '.join(AXES)}, or "
            "None."
        )
    chosen = {name: tuple(axes) if isinstance(axes, list) else axes for name, axes in overrides}
    return tuple((name, chosen.get(name, axes)) for name, axes in RULES)


def _mesh_axes(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _rules() -> Rules:
    """The rules in force (`nn.logical_axis_rules`), else `RULES`."""
    return tuple(nn.get_logical_axis_rules()) or RULES


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices.

    Args:
      sizes: devices along each axis; at most one may be -1, which takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    given = [n for n in shape if n != -1]
    fixed = int(np.prod(given))
    if shape.count(-1) > 1 or min(given) < 1 or len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise ValueError(
            f"config.mesh {dict(zip(AXES, shape, strict=True))} does not fit {len(devices)} device(s): the sizes must "
            "multiply to that number, and at most one may be -1."
        )
    shape = [len(devices) // fixed if n == -1 else n for n in shape]
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@functools.cache
def boxed_params(model: nn.Module) -> Any:
    """The base tree of a model as `jax.ShapeDtypeStruct`s in Linen's boxes, which name the logical axes."""
    ids, mask = jax.ShapeDtypeStruct((1, 2), np.int32), jax.ShapeDtypeStruct((1, 2), np.bool_)
    return jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"]


def abstract_params(model: nn.Module, mesh: Mesh, dtype: Any) -> Any:
    """The base tree of a model as `jax.ShapeDtypeStruct`s in `dtype`, each with its sharding by the rules in force.

    Raises:
      ValueError: names every parameter that has a logical axis without a rule, or a size that the mesh does not divide.
    """
    boxed = boxed_params(model)
    specs = nn.get_partition_spec(boxed)
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    axes = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    named = [(jax.tree_util.keystr(path), x.shape, spec) for (path, x), spec in zip(leaves, axes, strict=True)]
    shardings = jax.tree.unflatten(treedef, _named_shardings(named, mesh))
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), shapes, shardings)


def shardings(declared: Any, mesh: Mesh) -> Any:
    """The sharding, by the rules in force, of every array in a tree of declarations.

    Args:
      declared: a tree whose leaves have a `shape` and logical `axes`, such as `state.Leaf`.

    Raises:
      ValueError: names every array with an axis without a rule, or with a size that the mesh does not divide.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(declared, is_leaf=_is_declared)
    named = [(jax.tree_util.keystr(path), leaf.shape, leaf.axes) for path, leaf in leaves]
    return jax.tree.unflatten(treedef, _named_shardings(named, mesh))


def shardings_like(tree: Any, declared: Any, mesh: Mesh) -> Any:
    """The shardings of a tree that holds arrays for those declared, such as an optimizer's state for what it trains.

    An array is placed as the declared one whose path its own ends with, and whose shape it has; all others, such as
    counts, are whole on every device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=_is_declared)
    known = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def axes(path: tuple, x: Any) -> tuple[str | None, ...]:
        whole = jax.tree_util.keystr(path)
        twins = [leaf for name, leaf in known.items() if whole.endswith(name) and leaf.shape == x.shape]
        return twins[0].axes if twins else (None,) * x.ndim

    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path), x.shape, axes(path, x)) for path, x in leaves]
    return jax.tree.unflatten(treedef, _named_shardings(named, mesh))


def _is_declared(x: Any) -> bool:
    return hasattr(x, "axes") and hasattr(x, "shape")


def _named_shardings(named: Sequence[tuple[str, tuple, Sequence]], mesh: Mesh) -> list[NamedSharding]:
    """Shardings of (name, shape, logical axes)."""
    rules = _rules()
    known = {name for name, _ in rules}
    unruled = [f"{name}: {tuple(axes)}" for name, _, axes in named if any(axis and axis not in known for axis in axes)]
    if unruled:
        raise ValueError("no sharding rule in sharding.RULES for " + "; ".join(unruled))
    specs = [nn.logical_to_mesh_axes(_once(axes), rules) for _, _, axes in named]
    indivisible = [
        f"{name}: {size} over {axis}={_size(mesh, axis)}"
        for (name, shape, _), spec in zip(named, specs, strict=True)
        for axis, size in zip(spec, shape, strict=False)
        if size % _size(mesh, axis)
    ]
    if indivisible:
        raise ValueError("config.mesh does not divide the model's sizes; choose other ones: " + "; ".join(indivisible))
    return [NamedSharding(mesh, spec) for spec in specs]


def _once(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """Axes of which none occurs twice: a square array is split along one side at most."""
    return tuple(None if axis in axes[:place] else axis for place, axis in enumerate(axes))


def _size(mesh: Any, axis: Any) -> int:
    return int(np.prod([mesh.shape[name] for name in _mesh_axes(axis)]))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """An activation split by the rules for its logical axes; as it is where no mesh is set (`jax.set_mesh`).

    A dimension that the mesh does not divide, such as few heads for keys and values, is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    dims = zip(spec_of(axes), x.shape, strict=True)
    spec = [PartitionSpec.UNCONSTRAINED if size % _size(mesh, axis) else axis for axis, size in dims]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def spec_of(axes: Sequence[str]) -> PartitionSpec:
    """Mesh axes of logical axes, by the rules in force."""
    return nn.logical_to_mesh_axes(axes, _rules())


def divides(mesh: Any, shape: Sequence[int], axes: Sequence[str]) -> bool:
    """Whether the mesh splits an array of this shape and these logical axes into equal parts."""
    return not any(size % _size(mesh, axis) for size, axis in zip(shape, spec_of(axes), strict=True))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_slices(mesh: Mesh) -> dict[int, int]:
    """{process: which slice of a batch its devices hold}, of as many equal slices as there are different values.

    Processes whose devices hold the same rows, as where a tensor group spans hosts, have the same slice.

    Raises:
      ValueError: the processes hold unequal shares, or shares that overlap.
    """
    held: dict[int, set[int]] = {}
    for shard, devices in enumerate(mesh.devices.reshape(_size(mesh, BATCH_AXES), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(shard)
    shares = sorted({tuple(sorted(shards)) for shards in held.values()})
    # Equal shares that together count every shard once cannot overlap.
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != _size(mesh, BATCH_AXES):
        raise ValueError(
            f"config.mesh {dict(mesh.shape)} gives the {len(held)} processes unequal or overlapping parts of a batch: "
            "choose sizes where data * fsdp is a multiple of the number of processes."
        )
    return {process: shares.index(tuple(sorted(shards))) for process, shards in held.items()}


def own_slice(mesh: Mesh) -> tuple[int, int]:
    """This process's slice of every batch: its number, and how many there are."""
    slices = batch_slices(mesh)
    return slices[jax.process_index()], len(set(slices.values()))


def check_batch_sizes(sizes: dict[str, int], mesh: Mesh) -> None:
    """Checks that batches split evenly over the mesh and over the processes.

    Args:
      sizes: {field of the config: rows of its global batches}.

    Raises:
      ValueError: names every field whose value does not.
    """
    batch_slices(mesh)
    shards = _size(mesh, BATCH_AXES)
    problems = [f"config.{field}={size}" for field, size in sizes.items() if size % shards]
    if problems:
        raise ValueError(
            f"{' and '.join(problems)}: batches are split over {shards} devices (config.mesh.data * config.mesh.fsdp); "
            "choose a multiple of that number."
        )


def place_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch (`own_slice`) as global arrays, split over the batch axes of the mesh."""
    sharding, slices = batch_sharding(mesh), own_slice(mesh)[1]

    def place(rows: np.ndarray) -> jax.Array:
        shape = (rows.shape[0] * slices, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(place, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device of the mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def abstract(declared: Any, mesh: Mesh) -> Any:
    """A tree of declarations as `jax.ShapeDtypeStruct`s with their shardings, which stand for its arrays."""
    return with_shardings(declared, shardings(declared, mesh))


def with_shardings(tree: Any, placed: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of a tree of anything with a shape and a dtype, with the shardings of another tree."""
    return jax.tree.map(
        lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), tree, placed, is_leaf=_is_declared
    )


def place(tree: Any, declared: Any, mesh: Mesh) -> Any:
    """Every array where `shardings` says of its declaration."""
    return jax.device_put(tree, shardings(declared, mesh))


def create(init: Callable[[], Any], declared: Any, mesh: Mesh) -> Any:
    """The tree that `init()` returns, each array made where `shardings` says of its declaration."""
    return jax.jit(init, out_shardings=shardings(declared, mesh))()
