"""Losses: token cross-entropy on the answer, and the reflection loss that keeps old attention in place (ARM)."""

import jax
import jax.numpy as jnp


def token_cross_entropy(logits: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood in nats, and the number of tokens it covers.

    Args:
      logits: [B, L, V].
      target: [B, L] int.
      mask: [B, L] bool, True where the loss counts.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(mask, nll, 0.0)), jnp.sum(mask)


def reflection_loss(
    targets: jax.Array, log_weights: jax.Array, valid: jax.Array, task_index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum over earlier tasks i of the mean over i's pseudo-samples of KL(target_i || weights) (SAPT, section 3.3).

    Args:
      targets: [T, T], row i the recorded mean attention of task i, zero on later slots.
      log_weights: [T, N, T], the current log attention of N pseudo-samples of each task.
      valid: [T, N] bool, False on padding of small pools.
      task_index: [] int, the current task; rows before it count.

    Returns:
      (loss [], KL of every task [T], zero where none counts), in nats.
    """
    target = targets[:, None, :]
    # A target of zero contributes nothing, also where the current weight is masked to -inf.
    current = jnp.where(target > 0, log_weights, 0.0)
    kl = jnp.sum(jax.scipy.special.xlogy(target, target) - target * current, axis=-1)
    counts = valid.sum(axis=1)
    mean = jnp.sum(jnp.where(valid, kl, 0.0), axis=1) / jnp.maximum(counts, 1)
    mean = jnp.where(jnp.arange(targets.shape[0]) < task_index, mean, 0.0)
    return mean.sum(), mean
