"""Token cross-entropy on the answer."""

import chex
import jax
import jax.numpy as jnp


def token_cross_entropy(
    logits: jax.Array, target: jax.Array, mask: jax.Array, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood in nats, and the number of tokens it covers.

    Args:
      logits: [B, L, V].
      target: [B, L] int.
      mask: [B, L] bool, True where the loss counts.
      weight: [B], how much the tokens of a row count in the sum; None is 1.
    """
    chex.assert_equal_shape([target, mask])
    chex.assert_equal_shape_prefix([logits, target], 2)
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    counted = jnp.where(mask, nll, 0.0)
    return jnp.sum(counted if weight is None else counted * weight[:, None]), jnp.sum(mask)
