"""What methods have in common whose blocks are learned alone, and chosen by where an input lies among features."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax import state
from sapt_jax.methods.base import Method, own_slot
from sapt_jax.state import Frozen, Task, Trainable

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Routed(Method):
    """Each task trains its block alone, and its inputs are measured after it; a test input takes one block."""

    pass_after: ClassVar[str | None] = "train"

    @abc.abstractmethod
    def fit_of_slots(self, frozen: Frozen, features: jax.Array) -> jax.Array:
        """How well features [..., F] fit each slot's task, [..., T]; the largest is chosen."""

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        """1 on the own slot while the task trains, its dev scores included, and on the best fit's afterwards.

        Zero everywhere where every task so far is withdrawn.
        """
        fit = jnp.where(state.active_slots(frozen, task), self.fit_of_slots(frozen, features), -jnp.inf)
        chosen = jnp.where(training | (task.steps > 0), task.slot, fit.argmax(axis=-1))
        return own_slot(frozen, features, chosen) * frozen.enabled
