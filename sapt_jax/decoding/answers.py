"""Answers to a batch of sources under a method's mixture, whose weights are computed once, from the source."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sapt_jax.decoding.beam_search import beam_search
from sapt_jax.decoding.greedy import extend_until_end, most_likely
from sapt_jax.decoding.sampling import draw, draw_apart
from sapt_jax.methods.base import Apply, Method
from sapt_jax.state import Frozen, Task, Trainable, rng


class Ends(NamedTuple):
    """Where answers end: the most tokens of one, the end token, and what stands after it."""

    new_tokens: int
    eos_id: int
    pad_id: int


class Search(NamedTuple):
    """How the best answer is looked for: with one beam greedily, with more by `beam_search`."""

    beams: int = 1
    length_penalty: float = 0.0


class Sampling(NamedTuple):
    """How tokens are drawn, see `sampling.draw`; 0 and 1.0 cut nothing off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Wishes(NamedTuple):
    """What each row of a batch is to be answered with.

    Attributes:
      limits: [B] int32, the most tokens of an answer.
      seeds, numbers: [B] uint32; a row's random numbers depend on these two alone.
      temperatures, top_ps: [B] float32, see `sampling.draw`.
    """

    limits: jax.Array
    seeds: jax.Array
    numbers: jax.Array
    temperatures: jax.Array
    top_ps: jax.Array


class Read(NamedTuple):
    """A source that was read: logits [B, V] of the first token, the cache of B rows, the next step, and the weights."""

    logits: jax.Array
    cache: Any
    decode_step: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    weights: jax.Array


Question = tuple[Frozen, Trainable, jax.Array, jax.Array, Task]


def read_source(apply: Apply, method: Method, question: Question, new_tokens: int, answers: int) -> Read:
    """What every search starts from, for `answers` answers to each source.

    Args:
      question: (frozen, trainable, source [B, S], source_mask [B, S], task).
    """
    frozen, trainable, source, source_mask, task = question
    features = method.features(apply, frozen.base, source, source_mask)
    weights = method.test_weights(frozen, trainable, features, task)
    mixture = method.mixture(frozen, trainable, weights, task)
    logits, cache = apply(frozen.base, source, source_mask, new_tokens, mixture, method="prefill")
    of_answers = mixture.for_answers(answers)

    def decode_step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return apply(frozen.base, tokens, cache, of_answers, method="decode_step")

    return Read(logits, cache, decode_step, weights)


def make_generate(apply: Apply, method: Method, ends: Ends, search: Search) -> Callable:
    """Builds the jitted `generate(frozen, trainable, source, source_mask, task)`.

    It returns tokens [B, new_tokens] and the weights [B, T] that the blocks were mixed with. The source is read once
    for all beams.
    """

    def generate(
        frozen: Frozen, trainable: Trainable, source: jax.Array, source_mask: jax.Array, task: Task
    ) -> tuple[jax.Array, jax.Array]:
        question = (frozen, trainable, source, source_mask, task)
        read = read_source(apply, method, question, ends.new_tokens, search.beams)
        done = ~source_mask.any(axis=1)
        if search.beams == 1:
            tokens = extend_until_end(read.decode_step, most_likely, read.logits, read.cache, done, *ends)
            return tokens, read.weights
        answers, _ = beam_search(read.decode_step, read.logits, read.cache, done, *search, *ends)
        return answers[:, 0], read.weights

    return jax.jit(generate)


def make_sample(apply: Apply, method: Method, ends: Ends, sampling: Sampling) -> Callable:
    """Builds the jitted `sample(frozen, trainable, source, source_mask, task, rng)`: tokens [B, new_tokens].

    Rows are drawn apart, also where their sources are the same.
    """

    def sample(
        frozen: Frozen, trainable: Trainable, source: jax.Array, source_mask: jax.Array, task: Task, rng: jax.Array
    ) -> jax.Array:
        read = read_source(apply, method, (frozen, trainable, source, source_mask, task), ends.new_tokens, 1)

        def pick(logits: jax.Array, index: jax.Array) -> jax.Array:
            return draw(jax.random.fold_in(rng, index), logits, *sampling)

        done = ~source_mask.any(axis=1)
        return extend_until_end(read.decode_step, pick, read.logits, read.cache, done, *ends)

    return jax.jit(sample)


def make_answer(apply: Apply, method: Method, ends: Ends, drawn: bool) -> Callable:
    """Builds the jitted `answer(frozen, trainable, source, source_mask, task, wishes)`, which returns as `generate`.

    Each row ends at a limit of its own, which is at most that of `ends`: its tokens from there on say nothing. The loop
    stops with the last row.

    Args:
      drawn: whether tokens are drawn, each row with random numbers of its own; else they are the most likely ones.
    """

    def answer(
        frozen: Frozen, trainable: Trainable, source: jax.Array, source_mask: jax.Array, task: Task, wishes: Wishes
    ) -> tuple[jax.Array, jax.Array]:
        read = read_source(apply, method, (frozen, trainable, source, source_mask, task), ends.new_tokens, 1)
        keys = jax.vmap(lambda seed, number: rng(seed, "answer", number))(wishes.seeds, wishes.numbers)

        def pick(logits: jax.Array, index: jax.Array) -> jax.Array:
            if drawn:
                at = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
                tokens = draw_apart(at, logits, wishes.temperatures, wishes.top_ps)
            else:
                tokens = most_likely(logits, index)
            return jnp.where(index < wishes.limits, tokens, ends.eos_id)

        done = ~source_mask.any(axis=1)
        return extend_until_end(read.decode_step, pick, read.logits, read.cache, done, *ends), read.weights

    return jax.jit(answer)
