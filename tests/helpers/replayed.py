"""Lessons with rows of earlier tasks, their batches, and a model whose gradients can be written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.config import default_config
from sapt_jax.data import batching
from sapt_jax.data.buckets import choose_buckets
from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.data.lesson import make_lesson
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Prompt
from sapt_jax.programs import TrainState, make_train_step, optimizer_of
from tests.helpers.trees import at, empty_frozen, fresh, noise

BATCH, SHARE = 8, 0.25


def split_of(rng, rows, task, longest=(30, 9)):
    """A row's first token is 1000 times its task and its number."""

    def ragged(most):
        return Ragged.from_rows([[1000 * task + i, *rng.integers(3, 99, rng.integers(1, most))] for i in range(rows)])

    return EncodedSplit(ragged(longest[0]), ragged(longest[1]), 0, 0)


def with_texts(rng, split, task):
    """Texts of at most one token more than their rows, and a cue as long as the task's number tells."""
    lengths = split.lengths.sum(axis=1) - rng.integers(0, 3)
    rows = [[1000 * task + i, *rng.integers(3, 99, n)] for i, n in enumerate(lengths)]
    cues = Ragged.from_rows([[4] * (task + 1)] * len(split))
    return dataclasses.replace(split, writing=EncodedSplit(cues, Ragged.from_rows(rows), 0, 0))


def third_task(seed, texts=False, rows=(21, 5, 1)):
    """The lesson of task 2, and its parts by task."""
    rng = np.random.default_rng(seed)
    splits = {task: split_of(rng, n, task) for task, n in zip((2, 0, 1), rows, strict=True)}
    if texts:
        splits = {task: with_texts(rng, split, task) for task, split in splits.items()}
    return make_lesson(2, {2: splits[2]}, {0: splits[0], 1: splits[1]}, SHARE), splits


def batches(lesson, start=0, steps=12, process=(0, 1), seed=3):
    """The batches of a lesson in at most three shapes."""
    multiples = {"max_buckets": 3, "source_multiple": 4, "target_multiple": 2, "prompt_length": 0}
    layout = batching.Layout(choose_buckets(lesson.lengths, **multiples), BATCH, "right", 0, texts=(3, 1))
    place = batching.Steps(seed, start, steps), batching.Share(*process), batching.Prefetch(1, 4)
    return list(batching.train_batches(lesson, layout, *place))


class Linear:
    """A model whose logits are linear in the prompt, and its losses and their gradients token by token in float64."""

    vocab, length, rate = 11, 2, 0.05

    def __init__(self, seed):
        rng, self.model = np.random.default_rng(seed), make_model(VARIANTS["llama-tiny"], "float32", "none")
        width = self.model.config.d_model
        self.table = rng.normal(size=(100, width)) / 4
        self.base = {"token_embedder": {"embedding": jnp.asarray(self.table, jnp.float32)}}
        self.of_source, self.of_prompt = (rng.normal(size=(*n, self.vocab)) / 3 for n in ((width,), (2, width)))

    def apply(self, base, source, *rest, method=None, rng=None):
        """As `model.apply`."""
        embedded = base["token_embedder"]["embedding"][source % 100]
        if method == "embed":
            return embedded
        mask, target, _, mixture = rest
        read = jnp.einsum("BSD,BS,DV->BV", embedded, jnp.asarray(mask, jnp.float32), self.of_source)
        said = jnp.einsum("BPD,PDV->BV", mixture.prompt, self.of_prompt)
        return read[:, None] + said[:, None] * (1 + jnp.arange(target.shape[1]))[:, None] / 4

    def train(self, method, trees, lesson_batches, index):
        """Five updates by SGD: (the trainable tree after them, the metrics of each)."""
        (frozen, trainable), config = trees, default_config()
        config.optimizer.name, config.optimizer.options = "sgd", ()
        config.optimizer.learning_rate, config.optimizer.max_grad_norm = self.rate, 1e9
        optimizer = optimizer_of(config)
        step = jax.jit(make_train_step(config, self.apply, method, optimizer))
        state, metrics = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32)), []
        for batch in lesson_batches:
            batch = jax.tree.map(lambda x: x % self.vocab if x.dtype == np.int32 and x.ndim == 2 else x, batch)
            state, found = step(frozen, state, batch, None, at(index, slot=0))
            metrics.append(jax.tree.map(float, {name: x for name, x in found.items() if not x.ndim}))
        return state.trainable, metrics

    def trees(self, method, seed, index=0, frozen=None, previous=None):
        """What a task starts with; the first block is drawn."""
        frozen = empty_frozen(method, self.model, self.base, 1) if frozen is None else frozen
        trainable = fresh(method, self.model, self.base, seed, previous, frozen, task=at(index, slot=0))
        return frozen, trainable.replace(slot=noise(seed, trainable.slot)) if previous is None else trainable

    def tokens(self, batch):
        """(row, logits of the source [V], share of the prompt, id) of every token of a batch's answers."""
        for row, (source, mask) in enumerate(zip(batch["source"] % self.vocab, batch["source_mask"], strict=True)):
            read = self.table[source[mask]].sum(axis=0) @ self.of_source
            for place in np.flatnonzero(batch["target_mask"][row]):
                yield row, read, (1 + place) / 4, int(batch["target"][row, place]) % self.vocab

    def probabilities(self, prompt, read, share):
        logits = read + share * np.einsum("PD,PDV->V", prompt, self.of_prompt)
        exponents = np.exp(logits - logits.max())
        return exponents / exponents.sum()

    def mean_nll(self, prompt, batch, rows):
        """Mean over the tokens of these rows, and its gradient by the prompt."""
        losses, grads = [], []
        for row, read, share, token in self.tokens(batch):
            if row in rows:
                p = self.probabilities(prompt, read, share)
                losses.append(-np.log(p[token]))
                grads.append(share * self.of_prompt @ (p - np.eye(self.vocab)[token]))
        return (np.mean(losses), np.mean(grads, axis=0)) if losses else (0.0, 0.0)

    def mean_kl(self, before, prompt, batch, rows):
        """Mean over the tokens of these rows of KL(before || now), and its gradient by the prompt of now."""
        losses, grads = [], []
        for row, read, share, _ in self.tokens(batch):
            if row in rows:
                p, q = (self.probabilities(x, read, share) for x in (before, prompt))
                losses.append(np.sum(p * np.log(p / q)))
                grads.append(share * self.of_prompt @ (q - p))
        return (np.mean(losses), np.mean(grads, axis=0)) if losses else (0.0, 0.0)


def sides(batch, index):
    """The rows of earlier tasks, and the real ones of the task itself, read off their first tokens."""
    real = np.flatnonzero(batch["source_mask"].any(axis=1))
    earlier = [row for row in real if batch["source"][row][batch["source_mask"][row]][0] // 1000 < index]
    return earlier, [row for row in real if row not in earlier]


PET = Prompt(Linear.length)
