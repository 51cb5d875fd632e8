"""Draws tokens from a model's distribution, cut to its likely part."""

import jax
import jax.numpy as jnp


def draw(
    rng: jax.Array, logits: jax.Array, temperature: float | jax.Array, top_k: int, top_p: float | jax.Array
) -> jax.Array:
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


def draw_apart(keys: jax.Array, logits: jax.Array, temperatures: jax.Array, top_ps: jax.Array) -> jax.Array:
    """As `draw`, of all tokens, for every row [B] with a key, a temperature and a top_p of its own.

    What a row draws does not depend on the rows beside it.
    """

    def of_row(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
        return draw(key, logits[None], temperature, 0, top_p)[0]

    return jax.vmap(of_row)(keys, logits, temperatures, top_ps)
