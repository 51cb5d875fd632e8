"""Joint training: one block on the rows of all tasks at once. An upper bound: nothing can be forgotten."""

import dataclasses
from collections.abc import Sequence

from sapt_jax.methods.sequential import Sequential
from sapt_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Joint(Sequential):
    """One fit for the whole order, whose scores stand for those after every task.

    An epoch has as many rows as all tasks together, and the best checkpoint is that with the best mean of dev scores. A
    longer order is learned anew.
    """

    sampling: str = setting(
        "proportional",
        "Rows of an epoch: every row once, or equally many of each task, small ones again and of large ones a part.",
        choices=("proportional", "equal"),
    )

    @property
    def equal(self) -> bool:
        return self.sampling == "equal"

    def lessons(self, num_tasks: int) -> Sequence[tuple[int, ...]]:
        return [tuple(range(num_tasks))]

    def old_data(self, source: str) -> str:
        return "real"
