"""EPI: blocks learned alone, and chosen by where an input lies among the frozen model's features.

Wang et al., "Rehearsal-free Continual Language Learning via Efficient Parameter Isolation", ACL 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax import state
from sapt_jax.methods.base import Apply, Batch, real_rows
from sapt_jax.methods.pooling import mean_over_tokens
from sapt_jax.methods.routed import HIGHEST, Routed
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree


@dataclasses.dataclass(frozen=True)
class Epi(Routed):
    """Each task trains its block alone; a test input takes the block whose task's mean is nearest (Mahalanobis).

    In `memory` are the tasks' mean features [T, D], the sum of their covariances [D, D], and its pseudo-inverse: one
    covariance for all tasks. Generation has no classes, so that a task has one mean. Sums are exact: the order of tasks
    does not matter. What a mean over tasks would divide by changes no choice and is left out.
    """

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        width = state.width_of(parameters)
        square = Leaf((width, width), ("query", "query"))
        return {"means": Leaf((capacity, width), (state.TASKS, "query")), "covariance": square, "precision": square}

    def features(self, apply: Apply, base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        """The mean [B, D] over tokens of the bare model's last hidden states; of the encoder, where there is one."""
        return mean_over_tokens(apply(base, source, source_mask, method="encode"), source_mask)

    def fit_of_slots(self, frozen: Frozen, features: jax.Array) -> jax.Array:
        """Minus the Mahalanobis distances of the tasks' means."""
        apart = features[..., None, :] - frozen.memory["means"]
        whitened = jnp.einsum("...TD,DE->...TE", apart, frozen.memory["precision"], precision=HIGHEST)
        return -jnp.sum(whitened * apart, axis=-1)

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """Sums of the features [D] and of their outer products [D, D], and the number of rows."""
        real = real_rows(batch)
        features = self.features(apply, frozen.base, batch["source"], batch["source_mask"]) * real[:, None]
        outer = jnp.einsum("BD,BE->DE", features, features, precision=HIGHEST)
        return {"sum": features.sum(axis=0), "outer": outer, "rows": real.sum()}

    def summarise(self, memory: Tree, totals: Tree) -> Tree:
        """The task's mean, and the sum of all covariances with its pseudo-inverse, cut off as for float32 features."""
        mean = totals["sum"] / totals["rows"]
        covariance = memory["covariance"] + totals["outer"] / totals["rows"] - np.outer(mean, mean)
        cut = len(mean) * np.finfo(np.float32).eps
        precision = np.linalg.pinv(covariance, rcond=cut, hermitian=True)
        return {"mean": mean, "covariance": covariance, "precision": precision}

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """Block and mean are written to the task's slot; covariance and precision take the place of those before."""
        if found is None:
            raise ValueError("a task cannot end before its features were measured")
        means = jax.lax.dynamic_update_index_in_dim(frozen.memory["means"], found["mean"], task.slot, 0)
        memory = {"means": means, "covariance": found["covariance"], "precision": found["precision"]}
        return super().end_task(frozen, trainable, found, task).replace(memory=memory)
