"""Extends answers token by token over a KV cache, by default by the most likely token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
