"""Single-task training: every task alone, in a block of its own, and told which one an input is of. A bound."""

import dataclasses
from typing import ClassVar

import jax

from sapt_jax.methods.base import Method, own_slot
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class SingleTask(Method):
    """Each task trains a fresh block on the bare model, and is tested with it: nothing is forgotten or shared.

    The diagonal of its scores is what runs of one task each give, but for the seeds. A withdrawn task is answered by
    the bare model.
    """

    needs_task_id: ClassVar[bool] = True

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        slot = task.slot if training else task.rows
        if slot is None:
            raise ValueError("config.method='single_task' cannot answer an input whose task it is not told")
        return own_slot(frozen, features, slot) * frozen.enabled
