"""InfLoRA: IncLoRA whose blocks read only what inputs of earlier tasks did not span (arXiv 2404.00228)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax.methods import subspaces
from sapt_jax.methods.base import Apply, Batch, Logs, Seen
from sapt_jax.methods.inc_lora import IncLora
from sapt_jax.pet import Lora
from sapt_jax.settings import POSITIVE, setting
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree


@dataclasses.dataclass(frozen=True)
class InfLora(IncLora):
    """A task's A lies off the span of earlier tasks' inputs and is fixed; B alone is trained.

    y = W x + sum_i s (x A_i) B_i, so that x in the span of a projection's inputs in earlier tasks gives x A_t = 0, and
    what a task learns changes nothing there. In `memory` are the projectors P [layers, D, D] on these spans, one for
    all projections that read the same, and the number of tasks in them; after a task, P gains the directions of its
    inputs that `subspaces` says. As in the released code for T5 (gainlora, cl_trainer_inflora.py) but for this: a span
    is of the input itself, so that the value of cross-attention has the encoder's states and not the decoder's, and of
    all tokens of all rows, without padding. The moments [layers, D, D] are fetched after every batch of a pass, and
    their eigenvectors found on the host: both take a while on large models. A plain sum: to-hf, to-peft and to-torch
    need no weights.
    """

    pet: Lora

    threshold: float = setting(
        0.995, "Share of the squared singular values of E[x x^T] that the first task's span keeps.", subspaces.SHARE
    )
    rising_over: int = setting(15, "Tasks over which the share rises to 1.", POSITIVE)
    start: str = setting(
        "drawn",
        'A of a task: "drawn" and rid of the span, as in the released code for T5, or the largest directions of the '
        'task\'s own "inputs" off the span, as in the paper and in GainLoRA; these take a pass before the task.',
        choices=("drawn", "inputs"),
    )

    only: ClassVar[tuple[str, str] | None] = ("lora", "fixes LoRA's factor A")
    pass_after: ClassVar[str | None] = "train"

    @property
    def pass_before(self) -> str | None:
        return "train" if self.start == "inputs" else None

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        return {"spans": subspaces.span_leaves(parameters, self.block(parameters)), "tasks": Leaf((), ())}

    def begin_task(
        self, rng: jax.Array, leaves: Trainable, frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task
    ) -> Trainable:
        """A fresh block, its A off the span with columns of norm 1/sqrt(3); the first one drawn is left as it is."""
        fresh = super().begin_task(rng, leaves, frozen, previous, seen, task)
        if seen.found is not None:
            return fresh.replace(slot=subspaces.with_a_of_inputs(fresh.slot, seen.found))
        off = subspaces.off_span(frozen.memory["spans"], fresh.slot)
        first = frozen.memory["tasks"] == 0
        return fresh.replace(slot=jax.tree.map(lambda own, moved: jnp.where(first, own, moved), fresh.slot, off))

    def task_loss(
        self, apply: Apply, rng: jax.Array, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task
    ) -> tuple[jax.Array, Logs]:
        """The usual loss; A has no gradient, so that it has no part in the gradient's norm either."""
        return super().task_loss(apply, rng, frozen, subspaces.with_a_held(trainable), batch, task)

    def project(self, frozen: Frozen, before: Trainable, after: Trainable, task: Task) -> Trainable:
        """A stays what it was, also under weight decay."""
        return after.replace(slot=subspaces.with_a_of(before.slot, after.slot))

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """Of every input of adapted projections the sum of x x^T [layers, D, D]."""
        return subspaces.input_moments(self, apply, frozen, trainable, batch, task)

    def summarise_before(self, memory: Tree, totals: Tree) -> Tree:
        """What every input's A [layers, D, R] is to be."""
        return subspaces.leading_of_layers(memory["spans"], totals, self.pet.rank)

    def summarise(self, memory: Tree, totals: Tree) -> Tree:
        """The spans of all tasks so far. Scale does not matter: sums serve as means."""
        share = subspaces.share_kept(self.threshold, float(memory["tasks"]), self.rising_over)
        spans = subspaces.wider_spans(memory["spans"], totals, share, first=memory["tasks"] == 0)
        return {"spans": spans, "tasks": memory["tasks"] + 1}

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """The block is written to the task's slot, and the wider spans take the memory's place."""
        if found is None:
            raise ValueError("a task cannot end before its inputs were measured")
        return super().end_task(frozen, trainable, found, task).replace(memory=found)
