"""Sequential LoRA (or prompt): one block that every task goes on training, unprotected. The paper's lower bound."""

import jax

from sapt_jax.methods.sapt import Sapt
from sapt_jax.pet import Sites
from sapt_jax.state import Trainable


class SeqLora(Sapt):
    """A bank of one slot: its attention is 1 for every input, and there is no earlier task to reflect on."""

    uses_pseudo_samples = False

    def capacity(self, num_tasks: int) -> int:
        return 1

    def slot_index(self, task_index: int) -> int:
        return 0

    def open_task(self, rng: jax.Array, sites: Sites, table: jax.Array, previous: Trainable | None) -> Trainable:
        """The block goes on from the task before."""
        return super().open_task(rng, sites, table, None) if previous is None else previous
