"""Beam search over a KV cache, with the length penalty and the stopping rule of T5X (t5x/decoding.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class _State:
    """Two sets of W answers for each row: live ones that go on, and finished ones that hold their end token."""

    length: jax.Array  # [], tokens in each live answer
    live: jax.Array  # [B, W, N] ids
    live_log_probs: jax.Array  # [B, W], best first
    finished: jax.Array  # [B, W, N] ids
    finished_scores: jax.Array  # [B, W], best first; -inf where no answer has finished yet
    cache: Any


def brevity_penalty(alpha: float, length: jax.Array | int) -> jax.Array:
    """((5 + length) / 6) ** alpha: an answer's log-probability is divided by this (arXiv 1609.08144, section 7)."""
    return jnp.power((5.0 + length) / 6.0, alpha)


def beam_search(
    decode_step: Callable,
    logits: jax.Array,
    cache: Any,
    done: jax.Array,
    width: int,
    alpha: float,
    new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> tuple[jax.Array, jax.Array]:
    """Finds the answers of each row with the best log-probability / brevity penalty.

    Every step keeps the `width` best live answers and the `width` best finished ones. It ends when no live answer of
    any row could still beat a finished one, or at `new_tokens`. As in T5X, answers cut off there count only in rows
    where none has finished.

    Args:
      decode_step: (tokens [B * width], cache of as many rows) -> (logits [B * width, V], cache).
      logits: [B, V] of the first token.
      cache: as `prefill` returns it, of B rows.
      done: [B] bool, rows that need no answer: theirs is empty.
      width: the number of beams.
      alpha: of the brevity penalty; 0 is none, more favours longer answers.
      new_tokens: the longest answer, end token included.

    Returns:
      (ids [B, width, new_tokens] with `pad_id` after the end token, scores [B, width]), best first.
    """
    rows = logits.shape[0]
    cache = cache.replace(
        **{
            name: jnp.repeat(getattr(cache, name), width, axis=axis)
            for name, axis in (cache.answer_axes | cache.source_axes).items()
        }
    )

    def may_improve(state):
        best_possible = state.live_log_probs[:, 0] / brevity_penalty(alpha, new_tokens)
        return (state.length < new_tokens) & jnp.any(best_possible >= state.finished_scores[:, -1])

    def extend(state, logits):
        """Appends a token to the live answers, given logits [B, W, V] of it."""
        vocab_size = logits.shape[-1]
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)) + state.live_log_probs[..., None]
        # Twice the width: should the first half all end, the second goes on living.
        log_probs, index = jax.lax.top_k(log_probs.reshape(rows, -1), 2 * width)
        beams, tokens = index // vocab_size, index % vocab_size
        answers = _take_beams(state.live, beams, 0).at[:, :, state.length].set(tokens)
        ends = tokens == eos_id

        live_log_probs, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), width)
        scores = jnp.where(ends, log_probs / brevity_penalty(alpha, state.length + 1), -jnp.inf)
        scores = jnp.concatenate([state.finished_scores, scores], axis=1)
        finished = jnp.concatenate([state.finished, answers], axis=1)
        scores, best = jax.lax.top_k(scores, width)

        beams = jnp.take_along_axis(beams, kept, axis=1)
        cache = state.cache.replace(
            **{
                name: _reorder_rows(getattr(state.cache, name), beams, axis)
                for name, axis in state.cache.answer_axes.items()
            }
        )
        live, finished = _take_beams(answers, kept, 0), _take_beams(finished, best, 0)
        return _State(state.length + 1, live, live_log_probs, finished, scores, cache)

    def step(state):
        tokens = jax.lax.dynamic_index_in_dim(state.live, state.length - 1, axis=2, keepdims=False)
        logits, cache = decode_step(tokens.reshape(-1), state.cache)
        return extend(state.replace(cache=cache), logits.reshape(rows, width, -1))

    empty = jnp.full((rows, width, new_tokens), pad_id, jnp.int32)
    nothing = jnp.full((rows, width), -jnp.inf)
    start = _State(
        length=jnp.zeros((), jnp.int32),
        live=empty,
        # One live answer, the empty one: copies of it would all be extended alike.
        live_log_probs=nothing.at[:, 0].set(0.0),
        finished=empty,
        # Nothing beats a certain answer.
        finished_scores=jnp.where(done[:, None], jnp.inf, nothing),
        cache=cache,
    )
    state = extend(start, jnp.broadcast_to(logits[:, None], (rows, width, logits.shape[-1])))
    state = jax.lax.while_loop(may_improve, step, state)
    some = state.finished_scores[:, :1] > -jnp.inf
    cut_off = state.live_log_probs / brevity_penalty(alpha, new_tokens)
    return (
        jnp.where(some[..., None], state.finished, state.live),
        jnp.where(some, state.finished_scores, cut_off),
    )


def _take_beams(x: jax.Array, beams: jax.Array, axis: int) -> jax.Array:
    """Picks beams [B, M] of x, whose axes `axis` and `axis` + 1 are rows B and beams."""
    shape = (1,) * axis + beams.shape + (1,) * (x.ndim - axis - 2)
    return jnp.take_along_axis(x, beams.reshape(shape), axis=axis + 1)


def _reorder_rows(x: jax.Array, beams: jax.Array, axis: int) -> jax.Array:
    """Picks beams [B, W] of x, whose `axis` is rows times beams. Nothing moves between rows, or their devices."""
    apart = x.reshape(*x.shape[:axis], *beams.shape, *x.shape[axis + 1 :])
    return _take_beams(apart, beams, axis).reshape(x.shape)
