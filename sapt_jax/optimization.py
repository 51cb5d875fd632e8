"""AdamW with rates of its own for the block, the key and the query projection, and the learning-rate schedule."""

import jax
import jax.numpy as jnp
import optax

from sapt_jax.state import Trainable

SCHEDULES = ("constant", "linear", "cosine")


def make_optimizer(
    learning_rate: float,
    query_projection_learning_rate: float | None,
    key_learning_rate: float | None,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    """AdamW at peak learning rates, under clipping by the global norm.

    The schedule is not part of it: tasks differ in their number of steps and share one compiled step, which scales the
    updates by `schedule_factor`.

    Args:
      learning_rate: of the block, and of the key and the query projection where theirs is None.
    """

    def adamw(peak: float | None) -> optax.GradientTransformation:
        rate = learning_rate if peak is None else peak
        return optax.adamw(rate, beta1, beta2, epsilon, weight_decay=weight_decay)

    groups = {
        "slot": adamw(learning_rate),
        "query_projection": adamw(query_projection_learning_rate),
        "key": adamw(key_learning_rate),
    }

    def group_of(tree: Trainable) -> Trainable:
        return Trainable(
            slot=jax.tree.map(lambda _: "slot", tree.slot),
            key="key",
            query_projection=jax.tree.map(lambda _: "query_projection", tree.query_projection),
        )

    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.multi_transform(groups, group_of))


def schedule_factor(schedule: str, step: jax.Array, warmup_steps: int, total_steps: jax.Array) -> jax.Array:
    """The share [] of the peak learning rate at `step`: after warm-up "constant", or "linear" or "cosine" to zero.

    `step` (0-based) and `total_steps` may be traced.

    Raises:
      ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"config.optimizer.schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    done = jnp.clip((step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1), 0.0, 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done))}[schedule]
    return decay * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
