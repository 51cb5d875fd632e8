"""EWC: one block that tasks go on training, held where earlier tasks need it (Kirkpatrick et al., arXiv 1612.00796)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax.methods.base import Apply, Batch, Logs, Samples, real_rows
from sapt_jax.methods.sequential import Sequential
from sapt_jax.settings import NOT_NEGATIVE, POSITIVE, setting
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree, is_leaf


@dataclasses.dataclass(frozen=True)
class Ewc(Sequential):
    """Adds strength / 2 * sum F (theta - theta*)^2 over the block's entries, theta* the block after the task before.

    theta* is what the bank holds. In `memory` is F, the diagonal of the empirical Fisher: after a task, the mean over
    its rows of the squared gradient of each row's own NLL. It says nothing of LoRA's factor A while B is zero.
    """

    # No published value was found for T5 or LLaMA on SuperNI or Long Sequence.
    strength: float = setting(1e3, "Lambda; sweep it from 1e2 to 1e5 on the first tasks.", NOT_NEGATIVE)
    row_loss: str = setting(
        "sum",
        "NLL of a row: the sum or the mean over its answer's tokens. Lambda scales with it.",
        choices=("sum", "mean"),
    )
    accumulation: str = setting("sum", "Of F over tasks: their sum, or their mean.", choices=("sum", "mean"))
    fisher_rows: int = setting(1000, "Training rows that F is measured on, at most; 0 takes all.", NOT_NEGATIVE)
    rows_at_once: int = setting(8, "Rows, over all devices, whose gradients lie in memory together.", POSITIVE)

    pass_after: ClassVar[str | None] = "train"

    @property
    def rows_after(self) -> int:
        return self.fisher_rows

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        block = self.pet.block(parameters)
        return {"fisher": jax.tree.map(lambda leaf: Leaf(leaf.shape, leaf.axes), block, is_leaf=is_leaf)}

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        def drift(fisher: jax.Array, own: jax.Array, before: jax.Array) -> jax.Array:
            return jnp.sum(fisher * jnp.square(own - before)) / 2

        before = self.pet.read(frozen.bank, task.slot)
        drifts = jax.tree.map(drift, frozen.memory["fisher"], trainable.slot, before)
        total = sum(jax.tree.leaves(drifts), jnp.zeros(()))
        return self.strength * total, {"drift": total}

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """Squared gradients of every row's NLL, summed over rows, and the number of rows."""

        def nll(slot: Tree, row: Batch) -> jax.Array:
            alone, moved = jax.tree.map(lambda x: x[None], row), trainable.replace(slot=slot)
            # The model as it answers: nothing is dropped.
            features = self.features(apply, frozen.base, alone["source"], alone["source_mask"])
            weights = self.weights(frozen, moved, features, task, training=True)
            total, _ = self.answer_loss(apply, frozen, moved, weights, alone, task)
            return total / jnp.maximum(row["target_mask"].sum(), 1) if self.row_loss == "mean" else total

        def add(squares: Tree, rows: Batch) -> tuple[Tree, None]:
            grads = jax.vmap(jax.grad(nll), in_axes=(None, 0))(trainable.slot, rows)
            return jax.tree.map(lambda total, own: total + jnp.sum(jnp.square(own), axis=0), squares, grads), None

        # Every device keeps its rows: a micro-batch takes some of each device's.
        rows = len(batch["source"])
        number = rows // math.gcd(rows, self.rows_at_once)
        micro = jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), dict(batch))
        squares, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable.slot), micro)
        return {"squares": squares, "rows": real_rows(batch).sum()}

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """The bank holds the block, and the task's F joins that of the tasks before."""
        if found is None:
            raise ValueError("a task cannot end before its Fisher information was measured")

        def join(before: jax.Array, squares: jax.Array) -> jax.Array:
            own = squares / found["rows"]
            return before + own if self.accumulation == "sum" else before + (own - before) / (task.index + 1)

        fisher = jax.tree.map(join, frozen.memory["fisher"], found["squares"])
        return super().end_task(frozen, trainable, found, task).replace(memory={"fisher": fisher})
