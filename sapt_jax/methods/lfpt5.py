"""LFPT5: one block that answers tasks and writes their rows, held by what it said before (arXiv 2110.07298)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sapt_jax.methods.base import Apply, Batch, Logs, answer_logits, own_slot, real_rows
from sapt_jax.methods.losses import token_cross_entropy
from sapt_jax.methods.sequential import Sequential
from sapt_jax.settings import NOT_NEGATIVE, POSITIVE, setting
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class Lfpt5(Sequential):
    """The loss is (1 - distillation) (NLL(x -> y) + writing NLL(cue -> x, y)) + distillation KL(before || now).

    All are means over tokens, the first two over all rows, of which those of earlier tasks count for `share`; the KL
    over the answers of these alone, from the block as the task before left it to the one in training. The block learns
    to write a task's rows from its cue, and with config.pseudo_samples.source="generate" it then writes those that
    later tasks are trained on. One block serves all tasks, and an input needs no task.

    The authors' code has one soft prompt, after the input rather than before it, for each type of task, and sums the KL
    over positions at weights of 0.01 (classification) and 0.04: with ten of them in a batch, 0.1 of their mean.
    """

    share: float = setting(0.25, "Of the rows of a batch that are of earlier tasks.", POSITIVE)
    distillation: float = setting(0.1, "Weight of the KL; the other losses have the rest.", NOT_NEGATIVE)
    writing: float = setting(0.25, "Weight of the writing loss; theirs is 0.10 for summaries.", NOT_NEGATIVE)

    @property
    def samples(self) -> str | None:
        return "texts"

    @property
    def replay(self) -> float:
        return self.share

    def task_loss(
        self, apply: Apply, rng: jax.Array, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task
    ) -> tuple[jax.Array, Logs]:
        """Of the logs, the KL and the writing loss are means over tokens."""
        answer_rng, text_rng = jax.random.split(rng)
        weights = own_slot(frozen, batch["source"], task.slot)
        logits = answer_logits(
            functools.partial(apply, rng=answer_rng),
            frozen.base,
            batch,
            self.mixture(frozen, trainable, weights, task),
        )
        nll, tokens = token_cross_entropy(logits, batch["target"], batch["target_mask"], batch["weight"])
        before = answer_logits(apply, frozen.base, batch, self.pet.mix(frozen.bank, weights, task.slot))
        # Weights of rows of earlier tasks sum to this share of the tokens.
        held = jnp.where(batch["task"] < task.index, batch["weight"], 0.0) / self.share
        kl = jnp.sum(jnp.where(batch["target_mask"], token_kl(before, logits), 0.0) * held[:, None])
        of_texts = functools.partial(apply, rng=text_rng)
        writing, _ = self.answer_loss(of_texts, frozen, trainable, weights, batch["writing"], task)
        # Logs are divided by the number of rows.
        rows, tokens = real_rows(batch), jnp.maximum(tokens, 1)
        logs = {"distillation": kl * rows.sum() / tokens, "writing_loss": writing * rows.sum() / tokens}
        logs["attention"] = jnp.sum(weights * rows[:, None], axis=0)
        return (1 - self.distillation) * (nll + self.writing * writing) + self.distillation * kl, logs


def token_kl(before: jax.Array, now: jax.Array) -> jax.Array:
    """KL(before || now) in nats of the distributions of logits [..., V]."""
    log_before, log_now = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (before, now))
    return jnp.sum(jnp.exp(log_before) * (log_before - log_now), axis=-1)
