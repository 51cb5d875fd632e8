"""Shared attention over task keys: pooled input -> query -> weights on every task's block (SAPT, section 3.2)."""

import jax
import jax.numpy as jnp

LAYER_NORM_EPSILON = 1e-5


def pool(embeddings: jax.Array, mask: jax.Array, pool_padding: bool) -> jax.Array:
    """Element-wise maximum of the token embeddings over the valid positions.

    Args:
      embeddings: [B, L, D], the frozen table's rows of the source tokens.
      mask: [B, L] bool, True on tokens.
      pool_padding: as in the paper's released code, a row shorter than the longest of its batch also takes its padding
        embeddings into the maximum, so that weights depend on the batch.

    Returns:
      [B, D] float32; zero for a row without tokens.
    """
    embeddings = embeddings.astype(jnp.float32)
    lengths = mask.sum(axis=1)
    if pool_padding:
        mask = mask | (lengths < lengths.max())[:, None]
    pooled = jnp.max(embeddings, axis=1, where=mask[..., None], initial=-jnp.inf)
    return jnp.where((lengths > 0)[:, None], pooled, 0.0)


def init_query_projection(rng: jax.Array, d_model: int, hidden: int, std: float | None) -> dict[str, jax.Array]:
    """W_down [D, hidden], W_up [hidden, D], and LayerNorm's scale and bias [D], in float32.

    With `std` None both matrices are U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (the released code's T5), else N(0, std)
    (its LLaMA).
    """
    down_rng, up_rng = jax.random.split(rng)

    def matrix(key, shape):
        if std is not None:
            return std * jax.random.normal(key, shape, jnp.float32)
        return jax.random.uniform(key, shape, jnp.float32, -(shape[0] ** -0.5), shape[0] ** -0.5)

    return {
        "down": matrix(down_rng, (d_model, hidden)),
        "up": matrix(up_rng, (hidden, d_model)),
        "scale": jnp.ones((d_model,), jnp.float32),
        "bias": jnp.zeros((d_model,), jnp.float32),
    }


def init_key(rng: jax.Array, d_model: int) -> jax.Array:
    """A task key [D] ~ U(-1, 1)."""
    return jax.random.uniform(rng, (d_model,), jnp.float32, -1.0, 1.0)


def make_query(projection: dict[str, jax.Array], pooled: jax.Array) -> jax.Array:
    """LayerNorm(SiLU((x W_down) W_up)): pooled [..., D] -> query [..., D], float32. Nothing between the two."""
    hidden = jax.nn.silu(pooled @ projection["down"] @ projection["up"])
    mean = hidden.mean(axis=-1, keepdims=True)
    variance = jnp.square(hidden - mean).mean(axis=-1, keepdims=True)
    normed = (hidden - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return normed * projection["scale"] + projection["bias"]


def log_weights(query: jax.Array, keys: jax.Array, active: jax.Array, temperature: float) -> jax.Array:
    """log softmax over the active slots of (query . key) / (temperature * sqrt(D)).

    Args:
      query: [..., D].
      keys: [T, D].
      active: [T] bool, the slots that take part; all others get -inf, and where none takes part all do.
      temperature: multiplies sqrt(D); 1 in all of the paper's runs.

    Returns:
      [..., T] float32.
    """
    scores = query @ keys.T / (temperature * keys.shape[-1] ** 0.5)
    scores = jnp.where(active, scores, -jnp.inf)
    return jnp.where(active.any(), jax.nn.log_softmax(scores, axis=-1), -jnp.inf)
