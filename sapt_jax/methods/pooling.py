"""One vector for an input: its tokens' states pooled over the valid positions."""

import chex
import jax
import jax.numpy as jnp


def max_over_tokens(states: jax.Array, mask: jax.Array, pool_padding: bool) -> jax.Array:
    """Element-wise maximum over the valid positions.

    Args:
      states: [B, L, D], for SAPT the frozen table's rows of the source tokens (section 3.2).
      mask: [B, L] bool, True on tokens.
      pool_padding: as in the paper's released code, a row shorter than the longest of its batch also takes its padding
        into the maximum, so that it depends on the batch.

    Returns:
      [B, D] float32; zero for a row without tokens.
    """
    chex.assert_rank([states, mask], [3, 2])
    chex.assert_equal_shape_prefix([states, mask], 2)
    states = states.astype(jnp.float32)
    lengths = mask.sum(axis=1)
    if pool_padding:
        mask = mask | (lengths < lengths.max())[:, None]
    pooled = jnp.max(states, axis=1, where=mask[..., None], initial=-jnp.inf)
    return jnp.where((lengths > 0)[:, None], pooled, 0.0)


def mean_over_tokens(states: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean [B, D] over the valid positions of states [B, L, D], float32; zero for a row without tokens."""
    chex.assert_rank([states, mask], [3, 2])
    chex.assert_equal_shape_prefix([states, mask], 2)
    total = jnp.sum(states.astype(jnp.float32), axis=1, where=mask[..., None])
    return total / jnp.maximum(mask.sum(axis=1), 1)[:, None]
