"""Decoding over a KV cache. The mixture's weights are computed once per request, from the source."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapt_jax.decoding.beam_search import beam_search
from sapt_jax.methods.base import Method
from sapt_jax.programs import pooled_source


def extend_until_end(
    decode_step: Callable,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    cache: Any,
    done: jax.Array,
    new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> jax.Array:
    """Extends every row token by token until it ends.

    Args:
      decode_step: (tokens [B], cache) -> (logits [B, V], cache).
      pick: (logits [B, V], place of the token []) -> tokens [B].
      logits: [B, V] of the first token.
      done: [B] bool, rows that need no answer.
      new_tokens: most tokens per row; the loop stops earlier when all rows are done.

    Returns:
      [B, new_tokens] ids; `pad_id` after the end token.
    """

    def choose(logits, index, done):
        return jnp.where(done, pad_id, pick(logits, index).astype(jnp.int32))

    def unfinished(state):
        index, _, done, _, _ = state
        return (index < new_tokens) & ~jnp.all(done)

    def extend(state):
        index, token, done, tokens, cache = state
        logits, cache = decode_step(token, cache)
        token = choose(logits, index, done)
        return index + 1, token, done | (token == eos_id), tokens.at[:, index].set(token), cache

    first = choose(logits, jnp.zeros((), jnp.int32), done)
    tokens = jnp.full((first.shape[0], new_tokens), pad_id, jnp.int32).at[:, 0].set(first)
    state = (jnp.ones((), jnp.int32), first, done | (first == eos_id), tokens, cache)
    return jax.lax.while_loop(unfinished, extend, state)[3]


def most_likely(logits: jax.Array, index: jax.Array) -> jax.Array:
    """The greedy choice: the most likely token [B] under logits [B, V]."""
    del index
    return jnp.argmax(logits, axis=-1)


def draw(rng: jax.Array, logits: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Draws a token [B] from softmax(logits [B, V] / temperature), cut to its likely part.

    Args:
      top_k: only the k most likely tokens take part; 0 takes all.
      top_p: of these, in falling order, only those before which less than this probability lies (nucleus sampling,
        arXiv 1904.09751). The most likely token always takes part.
    """
    values, tokens = jax.lax.top_k(logits.astype(jnp.float32) / temperature, top_k or logits.shape[-1])
    likely = jax.nn.softmax(values, axis=-1)
    values = jnp.where(jnp.cumsum(likely, axis=-1) - likely < top_p, values, -jnp.inf)
    chosen = jax.random.categorical(rng, values, axis=-1)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0]


def read_source(
    model: nn.Module, method: Method, new_tokens: int, frozen, trainable, source, source_mask, slot_index, answers: int
) -> tuple[jax.Array, Any, Callable, jax.Array]:
    """What every search starts from, for `answers` answers to each source.

    Returns:
      (logits [B, V] of the first token, the cache of B rows, `decode_step`, the weights [B, T] of the mixture).
    """
    pooled = pooled_source(model, method, frozen.base, source, source_mask)
    weights = method.selection_weights(frozen, trainable, pooled, slot_index)
    mixture = method.mixture(frozen, trainable, weights, slot_index)
    variables = {"params": frozen.base}
    logits, cache = model.apply(variables, source, source_mask, new_tokens, mixture, method="prefill")
    of_answers = mixture.for_answers(answers)

    def decode_step(tokens, cache):
        return model.apply(variables, tokens, cache, of_answers, method="decode_step")

    return logits, cache, decode_step, weights


def make_generate(
    model: nn.Module, method: Method, new_tokens: int, eos_id: int, pad_id: int, beams: int, length_penalty: float
) -> Callable:
    """Builds the jitted `generate(frozen, trainable, source, source_mask, slot_index)`.

    It returns tokens [B, new_tokens] and the weights [B, T] that the blocks were mixed with. With one beam the
    search is greedy; with more it is `beam_search`, whose `alpha` is `length_penalty`. The source is read once for all
    beams.
    """

    def generate(frozen, trainable, source, source_mask, slot_index):
        logits, cache, decode_step, weights = read_source(
            model, method, new_tokens, frozen, trainable, source, source_mask, slot_index, beams
        )
        done = ~source_mask.any(axis=1)
        if beams == 1:
            ends = (new_tokens, eos_id, pad_id)
            return extend_until_end(decode_step, most_likely, logits, cache, done, *ends), weights
        answers, _ = beam_search(decode_step, logits, cache, done, beams, length_penalty, new_tokens, eos_id, pad_id)
        return answers[:, 0], weights

    return jax.jit(generate)


def make_sample(
    model: nn.Module,
    method: Method,
    new_tokens: int,
    eos_id: int,
    pad_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Callable:
    """Builds the jitted `sample(frozen, trainable, source, source_mask, slot_index, rng)`: tokens [B, new_tokens].

    Rows are drawn apart, also where their sources are the same. `temperature`, `top_k`, `top_p`: see `draw`.
    """

    def sample(frozen, trainable, source, source_mask, slot_index, rng):
        logits, cache, decode_step, _ = read_source(
            model, method, new_tokens, frozen, trainable, source, source_mask, slot_index, 1
        )

        def pick(logits, index):
            return draw(jax.random.fold_in(rng, index), logits, temperature, top_k, top_p)

        done = ~source_mask.any(axis=1)
        return extend_until_end(decode_step, pick, logits, cache, done, new_tokens, eos_id, pad_id)

    return jax.jit(sample)
