"""The programs of a run, lowered for a mesh of devices that need not exist: shapes and shardings stand for arrays."""

import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sapt_jax import sharding
from sapt_jax.methods.base import Method, Pools
from sapt_jax.models.families import DTYPES, VARIANTS, make_model, read_shape
from sapt_jax.programs import TaskScalars, TrainState
from sapt_jax.run import Learner, make_learner, make_method
from sapt_jax.state import Frozen, Trainable, init_frozen
from sapt_jax.tools.compile_check import model_flops

# Tasks of both benchmarks, and pseudo-samples of the largest pool (2% of dbpedia's training set).
TASKS = 15
POOL_ROWS = 280


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


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        sharding.shardings(tree, mesh),
    )


def _abstract_trees(config: Any, learner: Learner, capacity: int) -> tuple[Frozen, TrainState, Pools]:
    """Frozen tree, train state and pools, each leaf with the sharding that a run gives it."""
    model, method, mesh = learner.model, learner.method, learner.mesh
    base = sharding.abstract_params(model, mesh, DTYPES[config.model.param_dtype])
    sites, d_model = model.pet_sites(model.config), model.config.d_model
    rest = jax.eval_shape(lambda: init_frozen(None, method.pet, sites, d_model, capacity))
    table = base["token_embedder"]["embedding"]
    state = jax.eval_shape(learner.open_state, jax.eval_shape(learner.open_slot, jax.random.key(0), table, None))
    pools = Pools(
        jax.ShapeDtypeStruct((capacity, POOL_ROWS, d_model), jnp.float32),
        jax.ShapeDtypeStruct((capacity,), jnp.int32),
    )
    return _placed(rest, mesh).replace(base=base), _placed(state, mesh), _placed(pools, mesh)


def _batch(rows: int, source: int, target: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    split = sharding.batch_sharding(mesh)
    shapes = {"source": (rows, source), "target": (rows, target)}
    ids = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for name, shape in shapes.items()}
    masks = {f"{name}_mask": jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=split) for name, x in ids.items()}
    return ids | masks


def _reflection(method: Method, trainable: Trainable, frozen: Frozen, pools: Pools, slot_index: jax.Array) -> Any:
    def loss(trainable: Trainable) -> jax.Array:
        return method.auxiliary_loss(jax.random.key(0), frozen, trainable, pools, slot_index)[0]

    return jax.value_and_grad(loss)(trainable)


def programs_of(config: Any, mesh: Mesh) -> list[Program]:
    """The four programs of a run at its longest inputs and answers, with a full bank.

    `train` is a step with its reflection loss, `reflection` that loss and its gradient alone, `attention` what the
    reflection targets are measured with, `decode` answers a batch of inputs.

    Raises:
      ValueError: a field of the config that does not go with the mesh, or an unknown model.
    """
    rows, eval_rows = config.train.batch_size, config.eval.batch_size
    sharding.check_batch_sizes(
        {"train.batch_size / accumulation": rows // config.train.accumulation, "eval.batch_size": eval_rows}, mesh
    )
    shape, method = shape_of(config), make_method(config)
    source = _rounded(config.data.max_source_length, config.data.source_multiple, method.pet.prompt_length)
    target = _rounded(config.data.max_target_length, config.data.target_multiple, 0)
    new_tokens, beams = config.eval.max_new_tokens, config.eval.beams
    rules = sharding.make_rules(config.mesh.rules)
    # Of tokenizer and data, a learner's programs depend on these only.
    tokenizer = types.SimpleNamespace(pad_id=0, eos_id=1)
    stream = types.SimpleNamespace(tasks=range(TASKS), buckets=((source, target),))
    with nn.logical_axis_rules(rules):
        model = make_model(shape, config.model.dtype, config.model.remat, config.model.attention)
        learner = make_learner(config, model, method, tokenizer, stream, mesh)
        capacity = method.capacity(max(TASKS, config.pet.capacity))
        frozen, state, pools = _abstract_trees(config, learner, capacity)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    task = TaskScalars(scalar, scalar, scalar)
    asked = _batch(eval_rows, source, target, mesh)
    question = (frozen, state.trainable, asked["source"], asked["source_mask"], scalar)
    size = (shape, method.pet, capacity, source)
    return [
        Program(
            "train",
            learner.train_step,
            (frozen, state, _batch(rows, source, target, mesh), pools, task),
            rules,
            model_flops=rows * model_flops.teacher_forced(*size, target).train,
        ),
        Program(
            "reflection",
            jax.jit(functools.partial(_reflection, method)),
            (state.trainable, frozen.replace(base=None), pools, scalar),
            rules,
        ),
        Program("attention", learner.weights, question, rules),
        Program(
            "decode",
            learner.generate,
            question,
            rules,
            model_flops=eval_rows * model_flops.decoded(*size, new_tokens, beams).forward,
            loop_trips=new_tokens - 1,
        ),
    ]


def _rounded(length: int, multiple: int, prompt: int) -> int:
    """A bucket's length, rounded up together with the prompt before it."""
    return -(-(length + prompt) // multiple) * multiple - prompt
