"""Decoding over a KV cache. The mixture's weights are computed once per request, from the source."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapt_jax.beam_search import beam_search
from sapt_jax.methods.protocol import Method
from sapt_jax.train import pooled_source


def greedy(
    decode_step: Callable, logits: jax.Array, cache: Any, done: jax.Array, new_tokens: int, eos_id: int, pad_id: int
) -> jax.Array:
    """Extends every row by its most likely token until it ends.

    Args:
      decode_step: (tokens [B], cache) -> (logits [B, V], cache).
      logits: [B, V] of the first token.
      done: [B] bool, rows that need no answer.
      new_tokens: most tokens per row; the loop stops earlier when all rows are done.

    Returns:
      [B, new_tokens] ids; `pad_id` after the end token.
    """

    def pick(logits, done):
        return jnp.where(done, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))

    def unfinished(state):
        index, _, done, _, _ = state
        return (index < new_tokens) & ~jnp.all(done)

    def extend(state):
        index, token, done, tokens, cache = state
        logits, cache = decode_step(token, cache)
        token = pick(logits, done)
        return index + 1, token, done | (token == eos_id), tokens.at[:, index].set(token), cache

    first = pick(logits, done)
    tokens = jnp.full((first.shape[0], new_tokens), pad_id, jnp.int32).at[:, 0].set(first)
    state = (jnp.ones((), jnp.int32), first, done | (first == eos_id), tokens, cache)
    return jax.lax.while_loop(unfinished, extend, state)[3]


def make_generate(
    model: nn.Module, method: Method, new_tokens: int, eos_id: int, pad_id: int, beams: int, length_penalty: float
) -> Callable:
    """Builds the jitted `generate(frozen, trainable, source, source_mask, slot_index)`.

    It returns tokens [B, new_tokens] and the weights [B, T] that the blocks were mixed with. With one beam the
    search is greedy; with more it is `beam_search`, whose `alpha` is `length_penalty`. The source is read once for all
    beams.
    """

    def generate(frozen, trainable, source, source_mask, slot_index):
        pooled = pooled_source(model, method, frozen.base, source, source_mask)
        weights = method.selection_weights(frozen, trainable, pooled, slot_index)
        mixture = method.mixture(frozen, trainable, weights, slot_index)
        variables = {"params": frozen.base}
        logits, cache = model.apply(variables, source, source_mask, new_tokens, mixture, method="prefill")
        of_beams = mixture.for_answers(beams)

        def decode_step(tokens, cache):
            return model.apply(variables, tokens, cache, of_beams, method="decode_step")

        done = ~source_mask.any(axis=1)
        if beams == 1:
            return greedy(decode_step, logits, cache, done, new_tokens, eos_id, pad_id), weights
        answers, _ = beam_search(decode_step, logits, cache, done, beams, length_penalty, new_tokens, eos_id, pad_id)
        return answers[:, 0], weights

    return jax.jit(generate)
