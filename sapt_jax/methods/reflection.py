"""The reflection loss, which keeps the attention of earlier tasks in place (ARM: SAPT, section 3.3)."""

import chex
import jax
import jax.numpy as jnp


def reflection_loss(
    targets: jax.Array, log_weights: jax.Array, valid: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum over earlier tasks i of the mean over i's pseudo-samples of KL(target_i || weights).

    Args:
      targets: [T, T], row i the recorded mean attention of task i, zero on later slots.
      log_weights: [T, N, T], the current log attention of N pseudo-samples of each task.
      valid: [T, N] bool, False on padding of small pools.
      slot: [] int, the current slot; rows before it count.

    Returns:
      (loss [], KL of every task [T], zero where none counts), in nats.
    """
    capacity, rows = valid.shape
    chex.assert_shape([targets, log_weights], [(capacity, capacity), (capacity, rows, capacity)])
    target = targets[:, None, :]
    # A target of zero contributes nothing, also where the current weight is masked to -inf.
    current = jnp.where(target > 0, log_weights, 0.0)
    kl = jnp.sum(jax.scipy.special.xlogy(target, target) - target * current, axis=-1)
    mean = jnp.sum(jnp.where(valid, kl, 0.0), axis=1) / jnp.maximum(valid.sum(axis=1), 1)
    mean = jnp.where(jnp.arange(capacity) < slot, mean, 0.0)
    return mean.sum(), mean
