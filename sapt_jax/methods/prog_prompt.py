"""Progressive prompts: every task adds a prompt before those of the tasks before it.

Razdaibiedina et al., "Progressive Prompts: Continual Learning for Language Models", ICLR 2023 (arXiv 2301.12314).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax import state
from sapt_jax.methods.base import Method
from sapt_jax.pet import Mixture
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class ProgPrompt(Method):
    """The input of task i is [P_i, ..., P_0, x], newest first, and training changes P_i alone.

    An input's task is told at test time too. Nothing of x is cut for the prompts: the sequence grows by all of the
    bank's, and those that take no part are masked. The paper's residual MLP around a prompt is left out.
    """

    only: ClassVar[tuple[str, str] | None] = ("prompt", "puts prompts in a row")

    needs_task_id: ClassVar[bool] = True

    def prompt_length(self, capacity: int) -> int:
        return capacity * self.pet.prompt_length

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        """1 on every active slot up to that of the row's task."""
        own = jnp.expand_dims(jnp.asarray(task.rows), -1)
        shown = state.active_slots(frozen, task) & (jnp.arange(frozen.enabled.shape[0]) <= own)
        return jnp.broadcast_to(shown.astype(jnp.float32), (*features.shape[:-1], shown.shape[-1]))

    def mixture(self, frozen: Frozen, trainable: Trainable, weights: jax.Array, task: Task) -> Mixture:
        """The prompts of the slots with a weight, newest first, right before the input; the others left of them."""
        bank = self.pet.write(frozen.bank, trainable.slot, task.slot)["prompt"]
        slots = jnp.arange(weights.shape[1])
        order = jnp.argsort(jnp.where(weights > 0, -slots, -len(slots)), axis=1)
        shown = jnp.take_along_axis(weights > 0, order, axis=1)
        return Mixture(
            prompt=jnp.take(bank, order, axis=0).reshape(len(weights), -1, bank.shape[-1]),
            prompt_mask=jnp.repeat(shown, bank.shape[1], axis=1),
        )
