"""What a continual-learning method decides. Everything else (data, steps, checkpoints, scores) is the same for all."""

from typing import Any, Protocol

import jax
from flax import struct

from sapt_jax.pet import Mixture, Pet, Sites
from sapt_jax.state import Frozen, Trainable


@struct.dataclass
class Pools:
    """Pooled embeddings of the pseudo-samples of each task.

    The embedding table is frozen, so they are constants: reflection needs no forward pass of the language model.

    Attributes:
      pooled: [T, N, D] float32, N the largest pool; rows past a task's count are zero.
      counts: [T] int32.
    """

    pooled: jax.Array
    counts: jax.Array


class Method(Protocol):
    """The decisions of a method; pure functions of their arguments."""

    pet: Pet
    warm_start_steps: int
    # Whether pseudo-samples of earlier tasks make a difference.
    uses_pseudo_samples: bool

    def capacity(self, num_tasks: int) -> int:
        """Slots that the bank needs for a sequence of `num_tasks`."""

    def slot_index(self, task_index: int) -> int:
        """The slot that task `task_index` (0-based) trains."""

    def open_task(self, rng: jax.Array, sites: Sites, table: jax.Array, previous: Trainable | None) -> Trainable:
        """The trainable tree that a task starts from.

        Args:
          table: [V, D], the model's token embeddings.
          previous: what the task before ended with.
        """

    def warm_start(
        self,
        rng: jax.Array,
        frozen: Frozen,
        trainable: Trainable,
        inputs: jax.Array,
        pools: Pools,
        slot_index: jax.Array,
    ) -> Trainable:
        """What happens to the attention before a task's first step; `inputs` [N, D] are pooled training inputs."""

    def log_weights(self, frozen: Frozen, trainable: Trainable, pooled: jax.Array, slot_index: jax.Array) -> jax.Array:
        """Log attention [..., T] of inputs whose pooled embeddings are [..., D]."""

    def learning_weights(
        self, frozen: Frozen, trainable: Trainable, pooled: jax.Array, slot_index: jax.Array
    ) -> jax.Array:
        """Weights [..., T] that a training batch mixes the blocks with; gradients reach the attention through them."""

    def selection_weights(
        self, frozen: Frozen, trainable: Trainable, pooled: jax.Array, slot_index: jax.Array
    ) -> jax.Array:
        """Weights [..., T] that the blocks are mixed with at test time."""

    def mixture(self, frozen: Frozen, trainable: Trainable, weights: jax.Array, slot_index: jax.Array) -> Mixture:
        """The PET mixture under attention `weights` [B, T]."""

    def auxiliary_loss(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, pools: Pools, slot_index: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """A loss [] added to the task loss once per step, and what to log of it."""
