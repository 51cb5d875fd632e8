"""The programs of a run, lowered for a mesh of devices that need not exist: shapes and shardings stand for arrays."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sapt_jax import partitioning
from sapt_jax.compile_check import model_flops
from sapt_jax.decoding import make_generate
from sapt_jax.learner import make_method
from sapt_jax.methods.protocol import Method, Pools
from sapt_jax.models.loading import DTYPES, VARIANTS, make_model, read_shape
from sapt_jax.optimization import make_optimizer, schedule_factor
from sapt_jax.state import Frozen, Trainable, init_frozen
from sapt_jax.train import TaskScalars, TrainState, attention_weights, make_train_step

# Tasks of both benchmarks, and pseudo-samples of the largest pool (2% of dbpedia's training set).
CAPACITY = 15
POOL_ROWS = 280


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a run, and the abstract arguments of its largest batch.

    Attributes:
      model_flops: what one run asks of the model, see `model_flops`; 0 where the model does not run.
      loop_trips: runs of a loop that may stop early, at most.
    """

    name: str
    function: Callable
    arguments: tuple
    model_flops: int = 0
    loop_trips: int = 1

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """Traces the program for the mesh."""
        with jax.set_mesh(mesh), nn.logical_axis_rules(partitioning.RULES):
            return self.function.lower(*self.arguments)


def shape_of(config: Any) -> Any:
    """The model's shape: of the weights at config.model.path, or, where there are none, of a variant.

    The variant is `config.model.variant`, or the one that the last part of the path names.

    Raises:
      ValueError: neither names a known shape.
    """
    path, variant = config.model.path, config.model.variant
    if not path or Path(path).expanduser().exists() or path.startswith("pypi:"):
        return read_shape(path, variant)
    variant = variant or Path(path).name.lower()
    if variant not in VARIANTS:
        raise ValueError(
            f"config.model.path={path} is not there and names no known shape: set config.model.variant to one of "
            f"{', '.join(VARIANTS)}."
        )
    return VARIANTS[variant]


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _abstract_trees(
    config: Any, model: nn.Module, method: Method, optimizer: Any, mesh: Mesh
) -> tuple[Frozen, TrainState, Pools]:
    """Frozen tree, train state and pools, each leaf with the sharding that a run gives it."""
    base = partitioning.abstract_params(model, mesh, DTYPES[config.model.param_dtype])
    sites, d_model = model.pet_sites(model.config), model.config.d_model
    capacity = method.capacity(max(CAPACITY, config.pet.capacity))
    rest = jax.eval_shape(lambda: init_frozen(None, method.pet, sites, d_model, capacity))
    trainable = jax.eval_shape(
        lambda rng, table: method.open_task(rng, sites, table, None),
        jax.random.key(0),
        base["token_embedder"]["embedding"],
    )
    state = TrainState(trainable, jax.eval_shape(optimizer.init, trainable), jax.ShapeDtypeStruct((), jnp.int32))
    pools = Pools(
        jax.ShapeDtypeStruct((capacity, POOL_ROWS, d_model), jnp.float32),
        jax.ShapeDtypeStruct((capacity,), jnp.int32),
    )
    whole = partitioning.replicated(mesh)
    return _placed(rest, whole).replace(base=base), _placed(state, whole), _placed(pools, whole)


def _batch(rows: int, source: int, target: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = NamedSharding(mesh, PartitionSpec(partitioning.BATCH_AXES))
    shapes = {"source": (rows, source), "target": (rows, target)}
    ids = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name, shape in shapes.items()}
    masks = {f"{name}_mask": jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=sharding) for name, x in ids.items()}
    return ids | masks


def _reflection(method: Method, trainable: Trainable, frozen: Frozen, pools: Pools, slot_index: jax.Array) -> Any:
    def loss(trainable: Trainable) -> jax.Array:
        return method.auxiliary_loss(jax.random.key(0), frozen, trainable, pools, slot_index)[0]

    return jax.value_and_grad(loss)(trainable)


def programs_of(config: Any, mesh: Mesh) -> Iterator[Program]:
    """The four programs of a run at its longest inputs and answers, with a full bank.

    `train` is a step with its reflection loss, `reflection` that loss and its gradient alone, `attention` what the
    reflection targets are measured with, `decode` answers a batch of inputs.

    Raises:
      ValueError: a field of the config that does not go with the mesh, or an unknown model.
    """
    rows, eval_rows = config.train.batch_size, config.eval.batch_size
    partitioning.check_batch_sizes(
        {"train.batch_size / accumulation": rows // config.train.accumulation, "eval.batch_size": eval_rows}, mesh
    )
    shape = shape_of(config)
    model = make_model(shape, config.model.dtype, config.model.remat)
    method = make_method(config)
    options = config.optimizer
    optimizer = make_optimizer(
        options.learning_rate,
        options.query_projection_learning_rate,
        options.key_learning_rate,
        options.beta1,
        options.beta2,
        options.epsilon,
        options.weight_decay,
        options.max_grad_norm,
    )
    frozen, state, pools = _abstract_trees(config, model, method, optimizer, mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh))
    source = _rounded(config.data.max_source_length, config.data.source_multiple, method.pet.prompt_length)
    target = _rounded(config.data.max_target_length, config.data.target_multiple, 0)
    new_tokens, beams = config.eval.max_new_tokens, config.eval.beams
    size = (shape, method.pet, frozen.keys.shape[0], source)

    train_step = make_train_step(
        model,
        method,
        optimizer,
        lambda step, total: schedule_factor(options.schedule, step, options.warmup_steps, total),
        config.train.accumulation,
        config.seed,
        partitioning.replicated(mesh),
    )
    task = TaskScalars(scalar, scalar, scalar)
    arguments = (frozen, state, _batch(rows, source, target, mesh), pools, task)
    yield Program("train", train_step, arguments, rows * model_flops.teacher_forced(*size, target).train)

    arguments = (state.trainable, frozen.replace(base=None), pools, scalar)
    yield Program("reflection", jax.jit(functools.partial(_reflection, method)), arguments)

    batch = _batch(eval_rows, source, target, mesh)
    arguments = (frozen, state.trainable, batch["source"], batch["source_mask"], scalar)
    yield Program("attention", jax.jit(functools.partial(attention_weights, model, method)), arguments)

    # Which ids end and pad an answer changes nothing in the program's size.
    generate = make_generate(model, method, new_tokens, 1, 0, beams, config.eval.length_penalty)
    work = eval_rows * model_flops.decoded(*size, new_tokens, beams).forward
    yield Program("decode", generate, arguments, work, loop_trips=new_tokens - 1)


def _rounded(length: int, multiple: int, prompt: int) -> int:
    """A bucket's length, rounded up together with the prompt before it."""
    return -(-(length + prompt) // multiple) * multiple - prompt
