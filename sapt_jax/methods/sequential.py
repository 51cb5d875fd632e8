"""Sequential LoRA or prompt: one block that every task goes on training, unprotected. The paper's lower bound."""

import dataclasses
from typing import ClassVar

import jax

from sapt_jax.methods.base import Method, Seen
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class Sequential(Method):
    """A bank of one slot, which is the whole mixture."""

    mixing: ClassVar[str] = "one"

    def capacity(self, num_tasks: int) -> int:
        return 1

    def slot_index(self, task_index: int) -> int:
        return 0

    def begin_task(
        self, rng: jax.Array, leaves: Trainable, frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task
    ) -> Trainable:
        """The block goes on from the task before."""
        return super().begin_task(rng, leaves, frozen, previous, seen, task) if previous is None else previous
