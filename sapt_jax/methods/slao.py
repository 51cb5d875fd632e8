"""SLAO: one block goes on learning, and another one merges what it learned (Qiao and Mahdavi, arXiv 2512.23017)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax.methods.base import Seen
from sapt_jax.methods.sequential import Sequential
from sapt_jax.pet import Mixture
from sapt_jax.state import Frozen, Parameters, Task, Trainable, Tree


@dataclasses.dataclass(frozen=True)
class Slao(Sequential):
    """The slot holds the working block, and the bank's only slot the merged one, with which tasks are tested.

    Task i, counted from 1, starts from Q of A = Q R and from B, as the working block ended the task before. What it
    ends with is merged: A_m = A, and B_m moves towards B by 1 / sqrt(i) of the way.
    """

    only: ClassVar[tuple[str, str] | None] = ("lora", "merges LoRA's factors")

    def kept_leaves(self, parameters: Parameters, capacity: int) -> Tree:
        """And the working block."""
        return super().kept_leaves(parameters, capacity) | {"slot": self.block(parameters)}

    def begin_task(
        self, rng: jax.Array, leaves: Trainable, frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task
    ) -> Trainable:
        """A fresh block, or that of the task before with orthonormal columns in A."""
        if previous is None:
            return super().begin_task(rng, leaves, frozen, previous, seen, task)

        def start(path: tuple, x: jax.Array) -> jax.Array:
            return orthonormal(x) if path[-1].key == "a" else x

        return previous.replace(slot=jax.tree_util.tree_map_with_path(start, previous.slot))

    def mixture(self, frozen: Frozen, trainable: Trainable, weights: jax.Array, task: Task) -> Mixture:
        """The working block while the task trains, its dev scores included, and the merged one afterwards."""
        merged = self.pet.read(frozen.bank, task.slot)
        block = jax.tree.map(lambda own, other: jnp.where(task.steps > 0, own, other), trainable.slot, merged)
        return super().mixture(frozen, trainable.replace(slot=block), weights, task)

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """The merged block, moved towards the working one."""
        share = 1 / jnp.sqrt(task.index + 1)

        def merge(path: tuple, own: jax.Array, before: jax.Array) -> jax.Array:
            return own if path[-1].key == "a" else before + share * (own - before)

        before = self.pet.read(frozen.bank, task.slot)
        merged = jax.tree_util.tree_map_with_path(merge, trainable.slot, before)
        return super().end_task(frozen, trainable.replace(slot=merged), found, task)


def orthonormal(a: jax.Array) -> jax.Array:
    """Q [..., D, R] of the QR decomposition of `a` whose R has no negative diagonal entry, which makes it unique."""
    q, r = jnp.linalg.qr(a)
    return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
