"""InfLoRA and GainLoRA written out in float64 with PyTorch, on a toy of two adapted projections, and our side of it.

The toy reads x = embedding of the answer's ids + mean embedding of the source, and says
logits = tanh(tanh(x W_0) W_1) embedding^T, with the blocks of the mixture beside both W.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sapt_jax import state
from sapt_jax.config import default_config
from sapt_jax.methods.base import Seen
from sapt_jax.models.layers import lora_delta, second_moment
from sapt_jax.programs import TrainState, make_train_step, optimizer_of
from sapt_jax.state import Leaf
from tests.helpers.trees import at

VOCABULARY, WIDTH, LAYERS = 13, 10, 2
SITE = ("decoder", "layers", "self_attention", "query")
PARAMETERS = {
    "token_embedder/embedding": Leaf((VOCABULARY, WIDTH), ("vocab", "embed")),
    "/".join((*SITE, "kernel")): Leaf((LAYERS, WIDTH, WIDTH), ("layers", "embed", "heads")),
}


def make_base(seed):
    rng = np.random.default_rng(seed)
    drawn = (rng.normal(size=(VOCABULARY, WIDTH)), 0.4 * rng.normal(size=(LAYERS, WIDTH, WIDTH)))
    table, kernels = (jnp.asarray(x, jnp.float32) for x in drawn)
    return {"token_embedder": {"embedding": table}, "kernels": kernels}


def apply(base, source, *rest, method=None, rng=None, collect=None):
    """The toy, as hooks are given a model."""
    table = base["token_embedder"]["embedding"]
    if method == "embed":
        return table[source]
    source_mask, target, tokens, pet = rest
    total = jnp.sum(table[source] * source_mask[..., None], axis=1)
    x = table[target] + (total / jnp.maximum(source_mask.sum(axis=1), 1)[:, None])[:, None]
    block, moments = pet.blocks["decoder"]["layers"]["self_attention"]["query"], []
    for layer in range(LAYERS):
        moments.append(second_moment(x, tokens))
        own = {name: factor[layer] for name, factor in block.items()}
        x = jnp.tanh(x @ base["kernels"][layer] + lora_delta(x, own, pet, jnp.float32))
    if collect is None:
        return x @ table.T
    return {"decoder": {"layers": {"self_attention": {"query": {"input": jnp.stack(moments)}}}}}


def batches_of(seed, number=5, rows=6):
    """Batches of which some rows are fillers, and of few words, so that inputs do not span everything."""
    rng = np.random.default_rng(seed)
    words = rng.choice(VOCABULARY, 5, replace=False)
    made = []
    for _ in range(number):
        ids = {name: rng.choice(words, (rows, 4)).astype(np.int32) for name in ("source", "target")}
        masks = {f"{name}_mask": np.arange(4) < rng.integers(1, 5, (rows, 1)) for name in ids}
        for mask in masks.values():
            mask[-1] = False
        made.append(ids | masks)
    return made


class Ours:
    """A method taught task by task on the toy, as a run teaches it."""

    def __init__(self, method, base, tasks):
        self.method, self.leaves = method, method.trainable_leaves(PARAMETERS)
        empty = state.empty(method.frozen_leaves(PARAMETERS, tasks))
        self.frozen = empty.replace(base=base, enabled=jnp.ones((tasks,), bool))
        self.trainable, self.index = None, 0
        config = default_config()
        self._optimizer = optimizer_of(config)
        self._measure = jax.jit(lambda *arguments: method.measure(apply, *arguments))
        self._step = jax.jit(make_train_step(config, apply, method, self._optimizer))

    def begin(self, batches):
        method, seen, place = self.method, Seen(), at(self.index, steps=0)
        rng = jax.random.key(self.index)
        start = method.begin_task(rng, self.leaves, self.frozen, self.trainable, seen, place)
        if method.pass_before:
            seen = Seen(found=self._found(method.summarise_before, start, batches))
            start = method.begin_task(rng, self.leaves, self.frozen, self.trainable, seen, place)
        self.trainable = start
        return start

    def drawn(self):
        """The numbers that the task's start is drawn with."""
        return state.start(jax.random.key(self.index), self.leaves, self.frozen.base)

    def fit(self, batches):
        run = TrainState(self.trainable, self._optimizer.init(self.trainable), jnp.zeros((), jnp.int32))
        for batch in batches:
            run, metrics = self._step(self.frozen, run, batch, None, at(self.index))
        self.trainable = run.trainable
        return metrics

    def end(self, batches):
        found = self._found(self.method.summarise, self.trainable, batches)
        self.frozen = self.method.end_task(self.frozen, self.trainable, found, at(self.index, steps=0))
        self.index += 1

    def _found(self, summarise, trainable, batches):
        place = at(self.index, steps=0)
        parts = [self._measure(self.frozen, trainable, batch, place) for batch in batches]
        totals = jax.tree.map(lambda *x: np.sum([np.asarray(y, np.float64) for y in x], axis=0), *parts)
        found = summarise(jax.tree.map(np.asarray, self.frozen.memory), totals)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)


def tensor(x):
    return torch.tensor(np.asarray(x, np.float64))


@dataclasses.dataclass
class Written:
    """The algorithm written out: blocks and gates in lists, bases of spans as matrices of columns.

    Attributes:
      scale: of a block; gated: blocks lie behind gates; fixed: A is not trained; from_inputs: A is found in inputs.
    """

    base: dict
    rank: int
    scale: float
    gated: bool
    fixed: bool
    from_inputs: bool
    lambda1: float = 0.0
    threshold: float = 0.995
    gate_threshold: float = 0.995
    rising_over: int = 15
    rescale: bool = True

    def __post_init__(self):
        self.table, self.kernels = tensor(self.base["token_embedder"]["embedding"]), tensor(self.base["kernels"])
        self.blocks, self.gates = [], []
        self.bases = [torch.zeros(WIDTH, 0, dtype=torch.float64) for _ in range(LAYERS)]
        self.gate_bases = None

    def begin(self, drawn, batches):
        """Opens a task from the numbers that ours drew."""
        a, b = (tensor(drawn.slot["decoder"]["layers"]["self_attention"]["query"][name]) for name in "ab")
        first = not self.blocks
        self.blocks.append([a, b])
        if self.gated:
            gate = {name: tensor(x) for name, x in drawn.selector.items()}
            if not first:
                gate |= {name: self.gates[-1][name].clone() for name in ("down", "up")}
            self.gates.append(gate)
        moments, of_gate = self.moments(batches)
        for layer in range(LAYERS):
            if self.from_inputs:
                off = moments[layer] - self.bases[layer] @ self.bases[layer].T @ moments[layer]
                a[layer] = torch.linalg.svd(off)[0][:, : self.rank] / 3**0.5
            elif self.fixed and not first:
                off = a[layer] - self.bases[layer] @ self.bases[layer].T @ a[layer]
                a[layer] = off / off.norm(dim=0) / 3**0.5
        if self.gated:
            c, u = of_gate["key"], torch.zeros(WIDTH, 0, dtype=torch.float64) if first else self.gate_bases["key"]
            direction = torch.linalg.svd(c - u @ u.T @ c)[0][:, 0]
            self.gates[-1]["key"] = direction * self.gates[-1]["key"].norm()

    def fit(self, batches, learning_rate=3e-4):
        """One update by AdamW without decay for each batch, under clipping to 1."""
        (a, b), trained = self.blocks[-1], []
        trained += [b] if self.fixed else [a, b]
        gate = self.gates[-1] if self.gated else {}
        trained += gate.values()
        for x in trained:
            x.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        for batch in batches:
            optimizer.zero_grad()
            (self.loss(batch) + self.penalty()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            before = {name: x.detach().clone() for name, x in gate.items()}
            optimizer.step()
            if len(self.blocks) > 1:
                with torch.no_grad():
                    for name, x in gate.items():
                        u, moved = self.gate_bases[name], x - before[name]
                        kept = x - u @ (u.T @ moved)
                        x.copy_(kept * x.norm(dim=0) / kept.norm(dim=0) if self.rescale else kept)
        for x in trained:
            x.requires_grad_(False)

    def end(self, batches):
        """Widens the spans by a task's inputs."""
        moments, of_gate = self.moments(batches)
        first, before = len(self.blocks) == 1, len(self.blocks) - 1
        shares = [x + (1 - x) * before / self.rising_over for x in (self.threshold, self.gate_threshold)]
        self.bases = [wider(u, c, shares[0], first) for u, c in zip(self.bases, moments, strict=True)]
        if self.gated:
            old = self.gate_bases or dict.fromkeys(of_gate)
            self.gate_bases = {name: wider(old[name], c, shares[1], first) for name, c in of_gate.items()}

    def pooled(self, batch, row):
        return self.table[batch["source"][row][batch["source_mask"][row]]].mean(dim=0)

    def openings(self, p):
        """The weight of every block for a pooled input [D]."""
        if not self.gated:
            return [1.0] * len(self.blocks)
        found = []
        for gate in self.gates:
            x = read(gate, p)["key"]
            cosine = x @ gate["key"] / (x.norm() * gate["key"].norm())
            found.append((2 * torch.sigmoid(4 * cosine) - 1).abs())
        return found

    def states(self, batch, row):
        """Inputs of both projections and logits, of the tokens of a row."""
        p = self.pooled(batch, row)
        x, inputs = self.table[batch["target"][row][batch["target_mask"][row]]] + p, []
        opened = self.openings(p)
        for layer in range(LAYERS):
            inputs.append(x)
            deltas = [w * self.scale * (x @ a[layer]) @ b[layer] for w, (a, b) in zip(opened, self.blocks, strict=True)]
            x = torch.tanh(x @ self.kernels[layer] + sum(deltas))
        return inputs, x @ self.table.T

    def loss(self, batch):
        total = 0.0
        for row in np.flatnonzero(batch["source_mask"].any(axis=1)):
            logits, ids = self.states(batch, row)[1], torch.tensor(batch["target"][row][batch["target_mask"][row]])
            total = total - torch.log_softmax(logits, dim=1)[range(len(ids)), ids.long()].sum()
        return total / batch["target_mask"].sum()

    def penalty(self):
        """O-LoRA's."""
        own, total = self.blocks[-1][0], torch.zeros((), dtype=torch.float64)
        for a, _ in self.blocks[:-1]:
            total = total + sum((a[layer].T @ own[layer]).abs().sum() for layer in range(LAYERS))
        return self.lambda1 * total

    def moments(self, batches):
        """Sums of x x^T: of both projections' inputs, and of what the last gate reads."""
        sums = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
        of_gate = {}
        for batch in batches:
            for row in np.flatnonzero(batch["source_mask"].any(axis=1)):
                for layer, x in enumerate(self.states(batch, row)[0]):
                    sums[layer] = sums[layer] + x.T @ x
                for name, x in read(self.gates[-1], self.pooled(batch, row)).items() if self.gated else ():
                    of_gate[name] = of_gate.get(name, 0.0) + torch.outer(x, x)
        return sums, of_gate


def read(gate, p):
    """What the arrays of a gate read of a pooled input [D]."""
    silu = torch.nn.functional.silu
    hidden = silu(p @ gate["down"])
    return {"down": p, "up": hidden, "key": silu(hidden @ gate["up"])}


def wider(basis, c, share, first):
    """Columns of a basis with those that the released code adds for a moment."""
    u, s, _ = torch.linalg.svd(c)
    total = float((s**2).sum())
    if first:
        count = int((torch.cumsum(s**2, 0) / total < share).sum())
        return u[:, : max(count, 1)]
    u, s, _ = torch.linalg.svd(c - basis @ basis.T @ c)
    held, count = (total - float((s**2).sum())) / total, 0
    while count < len(s) and held < share:
        held, count = held + float(s[count] ** 2) / total, count + 1
    return torch.cat([basis, u[:, :count]], dim=1)[:, : len(c)]


def assert_same_products(block, written, by="ab", atol=1e-5):
    """A block of ours and one written out: A and A B alike, but for the signs of the columns of A."""
    a, b = (np.array(block[name], np.float64) for name in "ab")
    for layer in range(LAYERS):
        own, other = a[layer], written[0][layer].detach().numpy()
        np.testing.assert_allclose(own * np.sign(np.sum(own * other, axis=0)), other, atol=atol)
        if "b" in by:
            np.testing.assert_allclose(own @ b[layer], other @ written[1][layer].detach().numpy(), atol=atol)
