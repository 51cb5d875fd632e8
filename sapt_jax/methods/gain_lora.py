"""GainLoRA: blocks that add up, each behind a gate that stays shut on inputs of earlier tasks (arXiv 2505.15424)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax import state
from sapt_jax.methods import subspaces
from sapt_jax.methods.base import Apply, Batch, Logs, Method, Samples, Seen, real_rows
from sapt_jax.methods.o_lora import OLora
from sapt_jax.methods.pooling import mean_over_tokens
from sapt_jax.pet import Lora
from sapt_jax.settings import NOT_NEGATIVE, POSITIVE, setting
from sapt_jax.state import TASKS, Frozen, Leaf, Parameters, Task, Trainable, Tree

TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class GainLora(Method):
    """y = W x + sum_i w_i s (x A_i) B_i, w_i = |tanh(2 cos(SiLU(SiLU(p down_i) up_i), key_i))|, p the mean embedding.

    Every gate is a task's own: down [D, 100] and up [100, D] begin as the task before left them, and its key as the
    largest direction of the gate's output on the task's inputs that earlier ones did not span. An update of each of the
    three keeps what lies off the span of what it read in earlier tasks, so that the gate stays near its start there,
    which is 0. Blocks are InfLoRA's, A the largest directions of the task's inputs off their span, as in the released
    code (gainlora, cl_trainer_gainlora_inflora.py); or, by `over`, O-LoRA's with its penalty, which that code leaves
    unwritten: a reconstruction from the paper. Other than there, p is a mean over an input's own tokens, so that it
    does not depend on the batch, and moments are those that InfLoRA has.

    In `selector` is the task's gate. In `memory` are the gates of earlier tasks, the projectors on what each of a
    gate's arrays read, those on the inputs of adapted projections for InfLoRA's blocks, and the number of tasks. Gates
    see each input: to-hf and to-peft take blocks under weights that are given, and to-torch refuses.
    """

    pet: Lora

    over: str = setting(
        "inf_lora",
        'What blocks are: "inf_lora", or "o_lora" (reconstructed: not in the released code).',
        choices=("inf_lora", "o_lora"),
        protocol=True,
    )
    hidden: int = setting(100, "Width between the two matrices of a gate.", POSITIVE)
    threshold: float = setting(
        0.995, "Share of the squared singular values of E[x x^T] that the first task's spans keep.", subspaces.SHARE
    )
    gate_threshold: float = setting(0.995, "The same of what gates read.", subspaces.SHARE)
    rising_over: int = setting(15, "Tasks over which these shares rise to 1.", POSITIVE)
    rescale: bool = setting(
        True,
        "After an update every column of a gate has the norm that it would have had without the constraint, as in the "
        "released code; this moves gates on earlier inputs too.",
        protocol=True,
    )
    lambda1: float = setting(0.5, "Of O-LoRA's blocks: weight of the overlap with earlier ones.", NOT_NEGATIVE)

    only: ClassVar[tuple[str, str] | None] = ("lora", "is made of LoRA blocks")
    mixing: ClassVar[str] = "gated"
    pass_after: ClassVar[str | None] = "train"

    @property
    def pass_before(self) -> str | None:
        return "train"

    @property
    def fixes_a(self) -> bool:
        """Whether A is fixed and off the spans of inputs."""
        return self.over == "inf_lora"

    def uses(self, hook: str) -> bool:
        return super().uses(hook) and (hook != "penalty" or not self.fixes_a)

    def memory(self, parameters: Parameters, capacity: int) -> Tree:
        gate, width = self.selector(parameters), state.width_of(parameters)
        read = {"down": (width, "query"), "up": (self.hidden, "query_hidden"), "key": (width, "query")}
        memory = {
            "gates": {name: Leaf((capacity, *leaf.shape), (TASKS, *leaf.axes)) for name, leaf in gate.items()},
            "gate_spans": {name: Leaf((size, size), (axis, axis)) for name, (size, axis) in read.items()},
            "tasks": Leaf((), ()),
        }
        return memory | ({"spans": subspaces.span_leaves(parameters, self.block(parameters))} if self.fixes_a else {})

    def selector(self, parameters: Parameters) -> Tree:
        """The gate: matrices ~ U(-1/sqrt(fan-in), 1/sqrt(fan-in)), key ~ U(-1, 1)."""
        width = state.width_of(parameters)

        def leaf(shape: tuple[int, ...], axes: tuple[str, ...], bound: float) -> Leaf:
            return Leaf(shape, axes, lambda rng, base: jax.random.uniform(rng, shape, jnp.float32, -bound, bound))

        return {
            "down": leaf((width, self.hidden), ("query", "query_hidden"), width**-0.5),
            "up": leaf((self.hidden, width), ("query_hidden", "query"), self.hidden**-0.5),
            "key": leaf((width,), ("query",), 1.0),
        }

    def features(self, apply: Apply, base: Tree, source: jax.Array, source_mask: jax.Array) -> jax.Array:
        """The mean [B, D] of the token embeddings."""
        return mean_over_tokens(apply(base, source, method="embed"), source_mask)

    def begin_task(
        self, rng: jax.Array, leaves: Trainable, frozen: Frozen, previous: Trainable | None, seen: Seen, task: Task
    ) -> Trainable:
        """A fresh block and key, the gate's matrices of the task before; then A and key by what was found."""
        fresh = state.start(rng, leaves, frozen.base)
        slot, gate = fresh.slot, fresh.selector
        if previous is not None:
            gate = {**previous.selector, "key": gate["key"]}
        if seen.found is not None:
            gate = {**gate, "key": seen.found["key"] * jnp.linalg.norm(gate["key"])}
            slot = subspaces.with_a_of_inputs(slot, seen.found["a"]) if self.fixes_a else slot
        return Trainable(slot, gate)

    def weights(
        self, frozen: Frozen, trainable: Trainable, features: jax.Array, task: Task, training: bool
    ) -> jax.Array:
        """How far each gate is open [..., T], from 0 to tanh 2 = 0.96; they do not sum to one."""
        gates = self._write(frozen.memory["gates"], trainable.selector, task.slot)
        opened = jax.vmap(opening, in_axes=(0, None), out_axes=-1)(gates, features)
        return opened * state.active_slots(frozen, task)

    def task_loss(
        self, apply: Apply, rng: jax.Array, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task
    ) -> tuple[jax.Array, Logs]:
        """The usual loss; a fixed A has no gradient."""
        held = subspaces.with_a_held(trainable) if self.fixes_a else trainable
        return super().task_loss(apply, rng, frozen, held, batch, task)

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        """O-LoRA's."""
        return OLora(self.pet, lambda1=self.lambda1).penalty(rng, frozen, trainable, samples, task)

    def project(self, frozen: Frozen, before: Trainable, after: Trainable, task: Task) -> Trainable:
        """Of the gate's update what lies off the spans, once there are any; a fixed A stays what it was."""
        first = frozen.memory["tasks"] == 0

        def kept(span: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            moved = new - jnp.tensordot(span, new - old, 1, precision=subspaces.HIGHEST)
            if self.rescale:
                wanted, has = (jnp.linalg.norm(x, axis=0, keepdims=True) for x in (new, moved))
                moved = moved * (wanted / jnp.maximum(has, TINY))
            return jnp.where(first, new, moved)

        gate = jax.tree.map(kept, frozen.memory["gate_spans"], before.selector, after.selector)
        slot = subspaces.with_a_of(before.slot, after.slot) if self.fixes_a else after.slot
        return Trainable(slot, gate)

    def measure(self, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
        """Sums of x x^T over rows of what the gate's arrays read, and over tokens of the inputs of projections."""
        features = self.features(apply, frozen.base, batch["source"], batch["source_mask"])

        def moment(x: jax.Array) -> jax.Array:
            x = x * real_rows(batch)[:, None]
            return jnp.einsum("BD,BE->DE", x, x, precision=subspaces.HIGHEST)

        sums = {"gate": jax.tree.map(moment, read_by(trainable.selector, features))}
        if not self.fixes_a:
            return sums
        return sums | {"inputs": subspaces.input_moments(self, apply, frozen, trainable, batch, task)}

    def summarise_before(self, memory: Tree, totals: Tree) -> Tree:
        """The direction of the key [D], and what every input's A [layers, D, R] is to be."""
        found = {"key": subspaces.leading(memory["gate_spans"]["key"], totals["gate"]["key"], 1)[:, 0]}
        if not self.fixes_a:
            return found
        return found | {"a": subspaces.leading_of_layers(memory["spans"], totals["inputs"], self.pet.rank)}

    def summarise(self, memory: Tree, totals: Tree) -> Tree:
        """The spans of all tasks so far, and the number of tasks."""

        def wider(spans: str, sums: str, threshold: float) -> Tree:
            share = subspaces.share_kept(threshold, float(memory["tasks"]), self.rising_over)
            return subspaces.wider_spans(memory[spans], totals[sums], share, first=memory["tasks"] == 0)

        found = {"gate_spans": wider("gate_spans", "gate", self.gate_threshold), "tasks": memory["tasks"] + 1}
        return found | ({"spans": wider("spans", "inputs", self.threshold)} if self.fixes_a else {})

    def end_task(self, frozen: Frozen, trainable: Trainable, found: Tree | None, task: Task) -> Frozen:
        """Block and gate are written to the task's slot, and the wider spans take the place of those before."""
        if found is None:
            raise ValueError("a task cannot end before its inputs were measured")
        gates = self._write(frozen.memory["gates"], trainable.selector, task.slot)
        return super().end_task(frozen, trainable, found, task).replace(memory={**found, "gates": gates})

    def _write(self, gates: Tree, gate: Tree, slot: jax.Array) -> Tree:
        return jax.tree.map(lambda x, own: jax.lax.dynamic_update_index_in_dim(x, own, slot, 0), gates, gate)


def read_by(gate: Tree, features: jax.Array) -> Tree:
    """What each array of a gate reads of features [..., D]: them, the hidden state [..., 100], its output [..., D]."""
    hidden = jax.nn.silu(jnp.matmul(features, gate["down"], precision=subspaces.HIGHEST))
    turned = jax.nn.silu(jnp.matmul(hidden, gate["up"], precision=subspaces.HIGHEST))
    return {"down": features, "up": hidden, "key": turned}


def opening(gate: Tree, features: jax.Array) -> jax.Array:
    """How far a gate is open [...] for features [..., D]: |2 sigmoid(4 cos) - 1| = |tanh(2 cos)|."""
    turned, key = read_by(gate, features)["key"], gate["key"]
    # Safe at zero, where idle gates and rows without tokens are.
    norms = jnp.sqrt(jnp.sum(turned**2, axis=-1) * jnp.sum(key**2) + TINY**2)
    return jnp.abs(jnp.tanh(2 * jnp.sum(turned * key, axis=-1) / norms))
