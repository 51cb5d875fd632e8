"""The device mesh, the rules from logical to mesh axes, and where arrays go."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axis. A parameter with an axis that has no rule is an error.
RULES: tuple[tuple[str, Any], ...] = (
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
)


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


def abstract_params(model: nn.Module, mesh: Mesh, dtype: Any) -> Any:
    """The base tree of a model as `jax.ShapeDtypeStruct`s in `dtype`, each with its sharding.

    Raises:
      ValueError: names every parameter that has a logical axis without a rule, or a size that the mesh does not divide.
    """
    example = jax.ShapeDtypeStruct((1, 2), np.int32), jax.ShapeDtypeStruct((1, 2), np.bool_)

    def init(rng, *batch):
        return model.init(rng, *batch)["params"]

    arguments = (jax.random.key(0), *example, *example)
    specs = nn.get_partition_spec(jax.eval_shape(init, *arguments))
    shapes = jax.eval_shape(lambda *batch: nn.meta.unbox(init(*batch)), *arguments)
    known = {name for name, _ in RULES}
    unruled = [
        f"{jax.tree_util.keystr(path)}: {spec}"
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        if any(name is not None and name not in known for name in spec)
    ]
    if unruled:
        raise ValueError("no sharding rule in partitioning.RULES for " + "; ".join(unruled))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    named = jax.tree_util.tree_leaves_with_path(shapes)
    indivisible = [
        f"{jax.tree_util.keystr(path)}: {size} over {axis}={mesh.shape[axis]}"
        for (path, x), sharding in zip(named, jax.tree.leaves(shardings), strict=True)
        for axis, size in zip(sharding.spec, x.shape, strict=False)
        if axis is not None and size % mesh.shape[axis]
    ]
    if indivisible:
        raise ValueError("config.mesh does not divide the model's sizes; choose other ones: " + "; ".join(indivisible))
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), shapes, shardings)


def check_batch_sizes(sizes: dict[str, int], mesh: Mesh) -> None:
    """Checks that batches split evenly over the mesh.

    Args:
      sizes: {field of the config: rows of its global batches}.

    Raises:
      ValueError: names every field whose value does not.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    problems = [f"config.{field}={size}" for field, size in sizes.items() if size % shards]
    if problems:
        raise ValueError(
            f"{' and '.join(problems)}: batches are split over {shards} devices (config.mesh.data * config.mesh.fsdp); "
            "choose a multiple of that number."
        )


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, split over the batch axes of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device of the mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))
