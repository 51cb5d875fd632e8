"""Builds what a run works with from its config: model, data, method and the jitted functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sapt_jax import pet, sharding
from sapt_jax.data.encoding import EncodedSplit
from sapt_jax.data.stream import Stream, load_stream
from sapt_jax.decoding.search import make_generate
from sapt_jax.methods import METHODS
from sapt_jax.methods.base import Method, Pools
from sapt_jax.models.families import load_params, make_model, read_shape
from sapt_jax.optimization import make_optimizer, schedule_factor
from sapt_jax.passes import Layout, decode_texts, map_sources
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.pretrained.tokenizer import Tokenizer, load_tokenizer
from sapt_jax.programs import attention_weights, init_state, make_train_step, pooled_source
from sapt_jax.state import Frozen, Trainable, commit, init_frozen

WARM_START_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Learner:
    """The parts of a run that no task changes."""

    model: nn.Module
    method: Method
    tokenizer: Tokenizer
    stream: Stream
    mesh: Mesh
    layout: Layout
    optimizer: optax.GradientTransformation
    train_step: Callable
    warm_start_step: Callable
    open_slot: Callable
    open_state: Callable
    commit_slot: Callable
    generate: Callable
    weights: Callable
    pooled: Callable

    def open_task(self, seed: int, task_index: int, base: Any, previous: Trainable | None) -> Trainable:
        """What task `task_index` starts from."""
        rng = jax.random.fold_in(jax.random.key(seed), task_index)
        return self.open_slot(rng, base["token_embedder"]["embedding"], previous)

    def warm_start(self, seed: int, task_index: int, frozen: Frozen, trainable: Trainable, pools: Pools) -> Trainable:
        """The trainable tree after the method's warm start on the task's training inputs."""
        if not self.method.warm_start_steps:
            return trainable
        (pooled,) = self._pool(frozen.base, self.stream.tasks[task_index].train)
        # A fixed number of rows: tasks differ in size and share one program.
        rows = np.random.default_rng([seed, task_index]).integers(len(pooled), size=WARM_START_ROWS)
        rng = jax.random.fold_in(jax.random.key(seed), task_index)
        slot = np.int32(self.method.slot_index(task_index))
        inputs = sharding.replicate(pooled[rows], self.mesh)
        return self.warm_start_step(rng, frozen.replace(base=None), trainable, inputs, pools, slot)

    def _pool(self, base: Any, split: EncodedSplit) -> list[np.ndarray]:
        return map_sources(lambda source, mask: (self.pooled(base, source, mask),), split, self.layout)

    def init_frozen(self, base: Any, capacity: int, disabled: tuple[str, ...]) -> Frozen:
        """An empty bank of `capacity` slots around the pretrained model, less the slots of withdrawn tasks."""
        enabled = np.ones((capacity,), bool)
        for name in disabled:
            enabled[self.method.slot_index(self.stream.names.index(name))] = False
        frozen = sharding.create(_empty_bank(self.model, self.method, capacity), self.mesh)
        return frozen.replace(base=base, enabled=sharding.replicate(enabled, self.mesh))

    def commit(self, frozen: Frozen, trainable: Trainable, target: np.ndarray, task_index: int) -> Frozen:
        """The frozen tree after task `task_index`, whose dev inputs attend as `target` [T] says."""
        slot = np.int32(self.method.slot_index(task_index))
        # The base stays out: a program's results are new arrays.
        return self.commit_slot(frozen.replace(base=None), trainable, target, slot).replace(base=frozen.base)

    def predict(
        self, frozen: Frozen, trainable: Trainable, split: EncodedSplit, slot_index: int
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Decoded texts of a split, and the attention weights [n, T] that each was decoded with."""
        slot = np.int32(slot_index)
        tokens, weights = map_sources(
            lambda source, mask: self.generate(frozen, trainable, source, mask, slot), split, self.layout
        )
        return decode_texts(tokens, self.tokenizer), weights

    def attention(self, frozen: Frozen, trainable: Trainable, split: EncodedSplit, slot_index: int) -> np.ndarray:
        """Attention weights [n, T] of a split's inputs."""
        slot = np.int32(slot_index)
        return map_sources(
            lambda source, mask: (self.weights(frozen, trainable, source, mask, slot),), split, self.layout
        )[0]

    def pools(self, frozen: Frozen, num_tasks: int) -> Pools:
        """The pooled pseudo-samples of the first `num_tasks` tasks, each in the row of its slot."""
        capacity, d_model = frozen.keys.shape
        sizes = [len(task.pseudo) for task in self.stream.tasks if task.pseudo]
        pooled = np.zeros((capacity, max(sizes, default=1), d_model), np.float32)
        counts = np.zeros((capacity,), np.int32)
        for index, task in enumerate(self.stream.tasks[:num_tasks]):
            if task.pseudo:
                (rows,) = self._pool(frozen.base, task.pseudo)
                slot = self.method.slot_index(index)
                pooled[slot, : len(rows)], counts[slot] = rows, len(rows)
        return sharding.replicate(Pools(pooled, counts), self.mesh)


def _open_slot(
    model: nn.Module, method: Method, rng: jax.Array, table: jax.Array, previous: Trainable | None
) -> Trainable:
    return method.open_task(rng, model.pet_sites(model.config), table, previous)


def _empty_bank(model: nn.Module, method: Method, capacity: int) -> Callable[[], Frozen]:
    shape = model.config
    return functools.partial(init_frozen, None, method.pet, model.pet_sites(shape), shape.d_model, capacity)


def make_pet(config: Any) -> pet.Pet:
    """The kind of PET block of a config.

    Raises:
      ValueError: unknown `config.pet.kind`.
    """
    options = config.pet
    if options.kind == "lora":
        return pet.Lora(options.rank, options.alpha, options.stop_gradient_through_bank)
    if options.kind == "prompt":
        return pet.Prompt(options.prompt_length)
    raise ValueError(f"config.pet.kind={options.kind!r} is unknown; choose lora or prompt.")


def make_method(config: Any) -> Method:
    """The continual-learning method of a config.

    Raises:
      ValueError: unknown `config.method`.
    """
    if config.method not in METHODS:
        raise ValueError(f"config.method={config.method!r} is unknown; choose one of {', '.join(METHODS)}.")
    return METHODS[config.method](
        pet=make_pet(config),
        query_hidden=config.attention.query_hidden,
        query_init_std=config.attention.query_init_std,
        temperature=config.attention.temperature,
        pool_padding=config.attention.pool_padding,
        learning=config.attention.learning,
        selection=config.attention.selection,
        kl_ratio=config.kl_ratio,
        reflection_batch=config.pseudo_samples.batch_size,
        warm_start_steps=config.attention.warm_start_steps,
        warm_start_learning_rate=config.attention.warm_start_learning_rate,
    )


def read_inputs(config: Any) -> tuple[nn.Module, Tokenizer, Stream]:
    """The model without its weights, the tokenizer, and the tokenised tasks.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault.
    """
    options = config.model
    shape = read_shape(options.path, options.variant)
    if not (options.tokenizer or options.path):
        raise ValueError('config.model.tokenizer is empty: name one, or "bytes", for a model without a path.')
    tokenizer = load_tokenizer(options.tokenizer or resolve_path(options.path))
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {shape.vocab_size} rows: "
            "config.model.tokenizer must be the one that the model was trained with."
        )
    model = make_model(shape, options.dtype, options.remat, options.attention)
    return model, tokenizer, load_stream(config, tokenizer, model.padding_side, make_method(config))


def build(config: Any, mesh: Mesh) -> tuple[Learner, Any]:
    """Reads model and data, and builds the jitted functions.

    Returns:
      The learner, and the base parameters.

    Raises:
      ValueError or FileNotFoundError: naming the file or config field at fault.
    """
    method = make_method(config)
    sizes = {
        "train.batch_size / accumulation": config.train.batch_size // config.train.accumulation,
        "eval.batch_size": config.eval.batch_size,
    }
    if config.pseudo_samples.source == "generate" and method.uses_pseudo_samples:
        sizes["pseudo_samples.generator.batch_size"] = config.pseudo_samples.generator.batch_size
    sharding.check_batch_sizes(sizes, mesh)
    # The data before the weights: these take minutes to load, and a mistake in the data would be told only then.
    model, tokenizer, stream = read_inputs(config)
    base = load_params(model, config.model.path, config.model.param_dtype, mesh, config.seed)
    return make_learner(config, model, method, tokenizer, stream, mesh), base


def make_learner(
    config: Any, model: nn.Module, method: Method, tokenizer: Tokenizer, stream: Stream, mesh: Mesh
) -> Learner:
    """The learner of a model and a method on a stream, with its jitted functions.

    What one of them returns is placed as the next one takes it, so that each compiles once for all tasks.
    """
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
    open_slot, open_state = functools.partial(_open_slot, model, method), functools.partial(init_state, optimizer)
    frozen = jax.eval_shape(_empty_bank(model, method, method.capacity(max(len(stream.tasks), config.pet.capacity))))
    table = jax.ShapeDtypeStruct((model.config.vocab_size, model.config.d_model), np.float32)
    trainable = jax.eval_shape(open_slot, jax.random.key(0), table, None)
    state = jax.eval_shape(open_state, trainable)
    of_frozen, of_trainable, of_state = (sharding.shardings(tree, mesh) for tree in (frozen, trainable, state))
    return Learner(
        model=model,
        method=method,
        tokenizer=tokenizer,
        stream=stream,
        mesh=mesh,
        layout=Layout(mesh, stream.buckets, config.eval.batch_size, model.padding_side, tokenizer.pad_id),
        optimizer=optimizer,
        train_step=make_train_step(
            model,
            method,
            optimizer,
            lambda step, total: schedule_factor(options.schedule, step, options.warmup_steps, total),
            config.train.accumulation,
            config.seed,
            (of_state, sharding.replicated(mesh)),
        ),
        warm_start_step=jax.jit(method.warm_start, out_shardings=of_trainable),
        open_slot=jax.jit(open_slot, out_shardings=of_trainable),
        open_state=jax.jit(open_state, out_shardings=of_state),
        commit_slot=jax.jit(commit, out_shardings=of_frozen),
        generate=make_generate(
            model,
            method,
            config.eval.max_new_tokens,
            tokenizer.eos_id,
            tokenizer.pad_id,
            config.eval.beams,
            config.eval.length_penalty,
        ),
        weights=jax.jit(functools.partial(attention_weights, model, method)),
        pooled=jax.jit(functools.partial(pooled_source, model, method)),
    )
