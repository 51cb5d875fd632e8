"""Replay: one block that goes on learning, with a share of every batch from the tasks before."""

import dataclasses

from sapt_jax.methods.sequential import Sequential
from sapt_jax.settings import POSITIVE, setting


@dataclasses.dataclass(frozen=True)
class Replay(Sequential):
    """Sequential training whose batches hold `share` rows of earlier tasks, drawn from those that are kept of each.

    The loss is (1 - share) times the mean over answer tokens of the task's own rows, and share times that of the
    others, however long the answers of either are. The kept rows are real ones, or written with answers by the model:
    config.pseudo_samples says how many and of which kind. A task's epochs go through its own rows, which takes
    1 / (1 - share) times the updates that it takes without replay; config.train.max_steps evens that out. The first
    task is sequential training.
    """

    share: float = setting(0.25, "Of the rows of a batch that are of earlier tasks.", POSITIVE)

    @property
    def samples(self) -> str | None:
        return "pairs"

    @property
    def replay(self) -> float:
        return self.share
