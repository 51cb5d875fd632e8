"""What a continual-learning method decides. Every hook has a default, so that a method writes the few that it needs."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sapt_jax import state
from sapt_jax.methods.losses import token_cross_entropy
from sapt_jax.methods.pooling import max_over_tokens
from sapt_jax.pet import Mixture, Pet
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree

# (base, *arguments, method=name of a method of the model, rng=key) -> what the model gives. A model that has dropout
# drops only where it is given a key. With collect=name it gives what its modules say under that name instead, such as
# `layers.MOMENTS`.
Apply = Callable[..., Any]
Batch = Mapping[str, Any]
Logs = dict[str, jax.Array]

# The kind of rows that stand for earlier tasks, by config.pseudo_samples.source.
OLD_DATA = {"train": "real", "generate": "written", "files": "authors'", "none": "none"}


class Samples(struct.PyTreeNode):
    """Features of pseudo-samples of earlier tasks, each task in the row of its slot.

    The base model is frozen, so they are constants: no forward pass of the language model.

    Attributes:
      features: [T, N, F] float32, N the largest pool; rows past a task's count are zero.
      counts: [T] int32.
    """

    features: jax.Array
    counts: jax.Array


class Seen(struct.PyTreeNode):
    """What was seen of a task's data before its first step.

    Attributes:
      features: [N, F] of training inputs, drawn with replacement, or None for a method that asks for no rows.
      found: what `summarise_before` made of the pass before the task, or None without one and until it was made.
      samples: of earlier tasks, or None.
    """

    features: jax.Array | None = None
    found: Tree | None = None
    samples: Samples | None = None


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A method: how tasks begin, what is trained, how blocks are mixed, and what is kept.

    A subclass is a frozen dataclass whose fields, made by `settings.setting`, are its settings. All hooks are pure, and
    all but those that summarise run under jit, with a traced task. One that a class does not define is no part of any
    program.

    Attributes:
      pet: the kind of block.
      statistics: the rank of the Gaussians that stand for the inputs of earlier tasks; 0 where `samples` do.
      only: the one kind of block that the method goes with, and why; None for any.
      needs_task_id: `Task.rows` is told at test time.
      mixing: what the weights are, for exporters: "sum" of all blocks, each at weight 1; "one" block, the bank's only;
        SAPT's "attention" over task keys; "gated", each at a weight of its own; or "routed", by default: anything else.
        A method with a `mixture` of its own says "sum" or "one" where after a task it answers with these blocks of the
        bank alone.
      samples: what the method wants of earlier tasks: "inputs" for its penalty; "pairs" of inputs and answers for its
        batches; "texts", these pairs, written by its own block, which every row of a batch teaches to write; or None.
      replay: the share of a batch that rows of earlier tasks fill; batches then have `task` and `weight`.
      equal: of tasks that are learned together, an epoch has equally many rows.
      pass_before, pass_after: the split that `measure` reads before a task's first step and after its last, or None.
      rows_before: training inputs whose features `begin_task` is given.
      rows_after: the most rows that the pass after a task reads, drawn from the split; 0 is all.
      features_after: `summarise` is also given the features of all training rows after a task.
    """

    pet: Pet
    statistics: int = 0

    only: ClassVar[tuple[str, str] | None] = None
    needs_task_id: ClassVar[bool] = False
    mixing: ClassVar[str] = "routed"
    pass_after: ClassVar[str | None] = None

    def __post_init__(self):
        name = type(self).__module__.rsplit(".", 1)[-1]
        if self.only and self.pet.kind != self.only[0]:
            (kind, why) = self.only
            raise ValueError(f"config.method={name!r} {why}: set config.pet.kind={kind!r}.")
        if self.statistics and self.samples:
            raise ValueError(
                f"config.method={name!r} wants the {self.samples} of earlier tasks as text, and "
                'config.pseudo_samples.source="statistics" keeps none: set it to generate, files or train.'
            )

    @property
    def samples(self) -> str | None:
        return None

    @property
    def pass_before(self) -> str | None:
        return None

    @property
    def replay(self) -> float:
        return 0.0

    @property
    def equal(self) -> bool:
        return False

    @property
    def rows_before(self) -> int:
        return 0

    @property
    def rows_after(self) -> int:
        return 0

    @property
    def features_after(self) -> bool:
        return False

    def old_data(self, source: str) -> str:
        """The kind of rows of earlier tasks that a run sees: "none", "real", "written" or "authors'"; or "statistics"
        of them.

        How many it keeps, `pseudo_samples.pools.rows_kept` counts.

        Args:
          source: config.pseudo_samples.source.
        """
        return OLD_DATA[source] if self.samples else "none"

    @property
    def routes(self) -> bool:
        """Whether it says itself, from an input alone, which task's block answers it: its choices are then scored."""
        return self.mixing not in ("sum", "one") and not self.needs_task_id and self.capacity(2) > 1

    def uses(self, hook: str) -> bool:
        """Whether programs call a hook: where the method's class defines it."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def capacity(self, num_tasks: int) -> int:
        """Slots that the bank needs for a sequence of `num_tasks`."""
        return num_tasks

    def lessons(self, num_tasks: int) -> Sequence[tuple[int, ...]]:
        """The tasks that are learned together, in turn; all of them are known from the last of them on."""
        return [(index,) for index in range(num_tasks)]

    def slot_index(self, task_index: int) -> int:
        """The slot that task `task_index` (0-based) trains."""
        return task_index

    def prompt_length(self, capacity: int) -> int:
        """Vectors that the mixture of a bank of `capacity` slots puts before an input; batches leave room for them."""
        return self.pet.prompt_length

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        """The leaves (`state.Leaf`) that the method keeps between tasks, all zero before the first."""
        return {}

    def selector(self, parameters: Parameters) -> Tree:
        """The leaves that the method learns beside the block."""
        return {}

    def block(self, parameters: Parameters) -> Tree:
        """The leaves of what a slot holds: by default one block of PET."""
        return self.pet.block(parameters)

    def frozen_leaves(self, parameters: Parameters, capacity: int) -> Frozen:
        """The leaves of the frozen tree with a bank of `capacity` slots; its base is None."""
        return Frozen(
            base=None,
            bank=state.bank_of(self.block(parameters), capacity),
            enabled=Leaf((capacity,), (state.TASKS,), dtype=jnp.bool_),
            memory=self.memory(parameters, capacity),
        )

    def trainable_leaves(self, parameters: Parameters) -> Trainable:
        """The leaves of the trainable tree."""
        return Trainable(self.block(parameters), self.selector(parameters))

    def kept_leaves(self, parameters: Parameters, capacity: int) -> Tree:
        """The leaves of all that a task leaves to the next one, with a bank of `capacity` slots."""
        frozen = self.frozen_leaves(parameters, capacity)
        return {"bank": frozen.bank, "memory": frozen.memory, "selector": self.selector(parameters)}

    def features(self, apply: Apply, base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        """What the method sees of inputs before it mixes: features [B, F] of source [B, S] and its mask."""
        return max_over_tokens(apply(base, source, method="embed"), source_mask, pool_padding=False)

    def begin_task(
        self, rng: jax.Array, leaves: Trainable, frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task
    ) -> Trainable:
        """Where a task starts: by default a fresh block, and the selector as the task before left it.

        With a pass before the task it is called twice: without `seen.found`, for the tree that is measured, and with
        it. Both times it is given the same random numbers.

        Args:
          leaves: declarations of the trainable tree.
          previous: what the task before ended with.
        """
        fresh = state.start(rng, leaves, frozen.base)
        return fresh if previous is None else fresh.replace(selector=previous.selector)

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        """Weights [..., T] that the blocks are mixed with: by default 1 on the own slot.

        A method with several parts in a slot, and a mixture of its own, may give a weight for each part instead.
        """
        return own_slot(frozen, features, task.slot)

    def test_weights(self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task) -> jax.Array:
        """Weights at test time: those of `weights`, or for a method that routes but is told the task, 1 on its slot."""
        if task.rows is not None and self.routes:
            return own_slot(frozen, features, task.rows) * frozen.enabled
        return self.weights(frozen, trainable, features, task, training=False)

    def mixture(self, frozen: Frozen, trainable: Trainable, weights: jax.Array, task: Task) -> Mixture:
        """The PET argument of the model under weights [B, T]: by default the bank with the slot in it."""
        return self.pet.mix(self.pet.write(frozen.bank, trainable.slot, task.slot), weights, task.slot)

    def task_loss(
        self, apply: Apply, rng: jax.Array, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task
    ) -> tuple[jax.Array, Logs]:
        """The loss of a batch, summed over its answers' tokens, and sums over its rows to log.

        By default that of `answer_loss`.
        """
        features = self.features(apply, frozen.base, batch["source"], batch["source_mask"])
        weights = self.weights(frozen, trainable, features, task, training=True)
        return self.answer_loss(functools.partial(apply, rng=rng), frozen, trainable, weights, batch, task)

    def answer_loss(
        self, apply: Apply, frozen: Frozen, trainable: Trainable, weights: jax.Array, batch: Batch, task: Task
    ) -> tuple[jax.Array, Logs]:
        """Token cross-entropy in nats under the mixture of weights [B, T], logged with them: attention [T].

        Where the batch says how much a row counts, its tokens do.

        Args:
          apply: with the batch's random numbers bound to it, for models that drop in training.
        """
        logits = answer_logits(apply, frozen.base, batch, self.mixture(frozen, trainable, weights, task))
        nll, _ = token_cross_entropy(logits, batch["target"], batch["target_mask"], batch.get("weight"))
        return nll, {"attention": jnp.sum(weights * real_rows(batch)[:, None], axis=0)}

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        """A loss [] that is added once a step, and what to log of it."""
        raise NotImplementedError

    def project(self, frozen: Frozen, before: Trainable, after: Trainable, task: Task) -> Trainable:
        """What is kept of an optimizer's update from `before` to `after`."""
        raise NotImplementedError

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """Sums over a batch's real rows; over a whole pass they are added up in float64 on the host."""
        raise NotImplementedError

    def summarise_before(self, memory: Tree, totals: Tree) -> Tree:
        """What the sums of the pass before a task say, as `summarise`, for `begin_task`."""
        return totals

    def summarise(self, memory: Tree, totals: Tree) -> Tree:
        """What the sums of the pass after a task say, in float64 on the host, from numpy arrays; by default the sums.

        Args:
          memory: the method's memory before the task's end.
          totals: with `features_after`, after a task, these also hold "features" [N, F].
        """
        return totals

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """What a task leaves: by default its block, written into the bank.

        Args:
          found: what `summarise` made of the pass after the task, in float32, or None without one.
        """
        return frozen.replace(bank=self.pet.write(frozen.bank, trainable.slot, task.slot))

    def told(self, memory: Tree) -> dict[str, Any]:
        """What of the memory is told in scores.json, by its name there."""
        return {}

    def moved(self, memory: Tree, weights: np.ndarray, slot: int) -> float | None:
        """How far weights [N, T] of the inputs of a slot's task are from what was recorded of it, in nats.

        None where the method records nothing of the kind.
        """
        return None

    def warning(self, logs: Mapping[str, np.ndarray], slot: int) -> str | None:
        """What a user should know of a task whose last logs, means over steps, are these; or None."""
        return None


def own_slot(frozen: Frozen, features: jax.Array, slot: jax.Array) -> jax.Array:
    """Weights [..., T] that are 1 on one slot, given as [] or as [...], and 0 elsewhere."""
    chosen = jnp.arange(frozen.enabled.shape[0]) == jnp.expand_dims(jnp.asarray(slot), -1)
    return jnp.broadcast_to(chosen.astype(jnp.float32), (*features.shape[:-1], chosen.shape[-1]))


def sum_of_slots(frozen: Frozen, features: jax.Array, task: Task) -> jax.Array:
    """Weights [..., T] that are 1 on every active slot."""
    active = state.active_slots(frozen, task).astype(jnp.float32)
    return jnp.broadcast_to(active, (*features.shape[:-1], active.shape[0]))


def answer_logits(apply: Apply, base: Tree, batch: Batch, mixture: Mixture) -> jax.Array:
    """Logits [B, L, V] of a batch's answers under a mixture."""
    return apply(base, *(batch[name] for name in ("source", "source_mask", "target", "target_mask")), mixture)


def real_rows(batch: Batch) -> jax.Array:
    """[B] bool, False on the rows that only fill a batch up."""
    return batch["source_mask"].any(axis=1)
