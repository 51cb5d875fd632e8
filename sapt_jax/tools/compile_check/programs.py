"""The programs of a run, lowered for a mesh of devices that need not exist: shapes and shardings stand for arrays."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sapt_jax import sharding
from sapt_jax.config import capacity_of, make_method
from sapt_jax.decoding.answers import Ends
from sapt_jax.methods import Method
from sapt_jax.methods.base import Logs, Samples
from sapt_jax.models.families import DTYPES, VARIANTS, make_model, parameters, read_shape
from sapt_jax.pet import Mixture
from sapt_jax.programs import make_programs
from sapt_jax.state import Frozen, Task, Trainable
from sapt_jax.tools.compile_check import model_flops

# Tasks of both benchmarks, and pseudo-samples of the largest pool (2% of dbpedia's training set).
TASKS = 15
POOL_ROWS = 280
CUE_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a run, and the abstract arguments of its largest batch.

    Attributes:
      rules: from logical to mesh axes.
      model_flops: what one run asks of the model, see `model_flops`; 0 where the model does not run.
      loop_trips: runs of a loop that may stop early, at most.
    """

    name: str
    function: Callable
    arguments: tuple
    rules: sharding.Rules
    model_flops: int = 0
    loop_trips: int = 1

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """Traces the program for the mesh."""
        with jax.set_mesh(mesh), nn.logical_axis_rules(self.rules):
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


def programs_of(config: Any, mesh: Mesh) -> list[Program]:
    """The programs of a run at its longest inputs and answers, with a full bank.

    `train` is a step with the method's penalty, `reflection` that penalty and its gradient alone, where there is one,
    `attention` finds the weights of a batch of inputs, and `decode` answers it.

    Raises:
      ValueError: a field of the config that does not go with the mesh, or an unknown model.
    """
    rows, asked = config.train.batch_size, config.eval.batch_size
    sharding.check_batch_sizes(
        {"train.batch_size / accumulation": rows // config.train.accumulation, "eval.batch_size": asked}, mesh
    )
    method, rules = make_method(config), sharding.make_rules(config.mesh.rules)
    capacity = capacity_of(config, method, TASKS)
    source = _rounded(config.data.max_source_length, config.data.source_multiple, method.prompt_length(capacity))
    target = _rounded(config.data.max_target_length, config.data.target_multiple, 0)
    with nn.logical_axis_rules(rules):
        options = config.model
        model = make_model(shape_of(config), options.dtype, options.remat, options.attention, options.dropout)
        # A run's end token is the tokenizer's, which changes no figure.
        ends = Ends(config.eval.max_new_tokens, eos_id=1, pad_id=0)
        programs = make_programs(config, model, method, mesh, ends)
        frozen = _frozen(config, model, method, capacity, mesh)
    batch, task, trainable = _batch((rows, source, target), mesh), _task(method, mesh), programs.state.trainable
    batch = _with_replay(batch, method, mesh)
    inputs = [_batch((asked, source, target), mesh)[name] for name in ("source", "source_mask")]
    samples = _samples(method, frozen, jax.eval_shape(programs.features, frozen.base, *inputs), mesh)
    question = (frozen, trainable, *inputs, task)
    mixture = _mixture(method, jax.eval_shape(programs.weights, *question), frozen, trainable, task)
    trained = model_flops.teacher_forced(model, mixture, source, target)
    decoded = model_flops.decoded(model, mixture, source, ends.new_tokens, config.eval.beams)
    training, penalised = (frozen, programs.state, batch, samples, task), (frozen, trainable, samples, task)
    penalty = [Program("reflection", _penalty(method), penalised, rules)] if method.uses("penalty") else []
    return [
        Program("train", programs.train_step, training, rules, rows * trained.train),
        *penalty,
        Program("attention", programs.weights, question, rules),
        Program("decode", programs.generate, question, rules, asked * decoded.forward, loop_trips=ends.new_tokens - 1),
    ]


def _rounded(length: int, multiple: int, prompt: int) -> int:
    """A bucket's length, rounded up together with the prompt before it."""
    return -(-(length + prompt) // multiple) * multiple - prompt


def _frozen(config: Any, model: nn.Module, method: Method, capacity: int, mesh: Mesh) -> Frozen:
    leaves = method.frozen_leaves(parameters(model), capacity)
    base = sharding.abstract_params(model, mesh, DTYPES[config.model.param_dtype])
    return sharding.abstract(leaves, mesh).replace(base=base)


def _batch(sizes: tuple[int, int, int], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of (rows, source tokens, answer tokens)."""
    split, (rows, source, target) = sharding.batch_sharding(mesh), sizes
    shapes = {"source": (rows, source), "target": (rows, target)}
    ids = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for name, shape in shapes.items()}
    masks = {f"{name}_mask": jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=split) for name, x in ids.items()}
    return ids | masks


def _with_replay(batch: dict[str, Any], method: Method, mesh: Mesh) -> dict[str, Any]:
    """The batch as a method with replay trains on it."""
    if not method.replay:
        return batch
    (rows, source), target = batch["source"].shape, batch["target"].shape[1]
    split = sharding.batch_sharding(mesh)
    weight = jax.ShapeDtypeStruct((rows,), jnp.float32, sharding=split)
    batch = batch | {"task": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split), "weight": weight}
    if method.samples == "texts":
        batch["writing"] = _batch((rows, CUE_TOKENS, source + target), mesh) | {"weight": weight}
    return batch


def _task(method: Method, mesh: Mesh) -> Task:
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return Task(number, number, number, number if method.needs_task_id else None)


def _samples(method: Method, frozen: Frozen, features: jax.ShapeDtypeStruct, mesh: Mesh) -> Samples | None:
    if method.samples != "inputs":
        return None
    capacity, whole = frozen.enabled.shape[0], sharding.replicated(mesh)
    return Samples(
        jax.ShapeDtypeStruct((capacity, POOL_ROWS, features.shape[-1]), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((capacity,), jnp.int32, sharding=whole),
    )


def _mixture(
    method: Method, weights: jax.ShapeDtypeStruct, frozen: Frozen, trainable: Trainable, task: Task
) -> Mixture:
    """The mixture of one row."""
    of_row = jax.ShapeDtypeStruct((1, *weights.shape[1:]), weights.dtype)
    return jax.eval_shape(method.mixture, frozen, trainable, of_row, task)


def _penalty(method: Method) -> Callable:
    def penalty(trainable: Trainable, frozen: Frozen, samples: Samples | None, task: Task) -> tuple[jax.Array, Logs]:
        return method.penalty(jax.random.key(0), frozen, trainable, samples, task)

    def with_gradient(frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task) -> tuple:
        return jax.value_and_grad(penalty, has_aux=True)(trainable, frozen, samples, task)

    return jax.jit(with_gradient)
