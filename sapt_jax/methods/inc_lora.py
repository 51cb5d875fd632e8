"""IncLoRA: a block of its own for every task, and the plain sum of all of them."""

import dataclasses
from typing import ClassVar

import jax

from sapt_jax.methods.base import Method, sum_of_slots
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class IncLora(Method):
    """Every task trains a fresh block on top of the frozen ones: y = W x + sum_i s (x A_i) B_i, each at weight 1.

    O-LoRA without its penalty (arXiv 2310.14152). With soft prompts the sum is that of the prompts.
    """

    mixing: ClassVar[str] = "sum"

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        return sum_of_slots(frozen, features, task)
