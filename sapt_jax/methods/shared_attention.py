"""Shared attention over task keys: pooled input -> query -> weights on every task's block (SAPT, section 3.2)."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER_NORM_EPSILON = 1e-5


class QueryProjection(nn.Module):
    """LayerNorm(SiLU((x W_down) W_up)), nothing between the two matrices.

    Attributes:
      hidden: width between them (100 in the paper).
      init_std: None for matrices ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (the released code's T5), else the standard
        deviation of normal ones (its LLaMA).
    """

    hidden: int
    init_std: float | None

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """pooled [..., D] -> query [..., D] float32."""
        if self.init_std is None:
            init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        else:
            init = nn.initializers.normal(self.init_std)

        def dense(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
            kernel_init = nn.with_logical_partitioning(init, axes)
            return nn.Dense(features, use_bias=False, kernel_init=kernel_init, name=name)

        hidden = dense(self.hidden, ("query", "query_hidden"), "down")(pooled)
        hidden = dense(pooled.shape[-1], ("query_hidden", "query"), "up")(hidden)
        norm = nn.LayerNorm(
            LAYER_NORM_EPSILON,
            use_fast_variance=False,
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("query",)),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("query",)),
            name="norm",
        )
        return norm(nn.silu(hidden))


class SharedAttention(nn.Module):
    """The attention, with what the current task learns of it as its parameters: its `key` [D] and `query_projection`.

    Attributes:
      query_hidden, query_init_std: see `QueryProjection`.
      temperature: multiplies sqrt(D) under the scores; 1 in all of the paper's runs.
    """

    query_hidden: int
    query_init_std: float | None
    temperature: float

    @nn.compact
    def __call__(self, pooled: jax.Array, keys: jax.Array, active: jax.Array, slot: jax.Array) -> jax.Array:
        """log softmax over the active slots of (query . key) / (temperature * sqrt(D)).

        Args:
          pooled: [..., D].
          keys: [T, D] of earlier tasks; the current one's is put at `slot`.
          active: [T] bool, the slots that take part; all others get -inf, and where none takes part all do.

        Returns:
          [..., T] float32.
        """
        capacity, width = keys.shape
        chex.assert_shape([pooled, active], [(..., width), (capacity,)])
        init = nn.with_logical_partitioning(_uniform, ("query",))
        key = self.param("key", init, (width,), jnp.float32)
        keys = jax.lax.dynamic_update_index_in_dim(jax.lax.stop_gradient(keys), key, slot, 0)
        query = QueryProjection(self.query_hidden, self.query_init_std, name="query_projection")(pooled)
        scores = query @ keys.T / (self.temperature * width**0.5)
        scores = jnp.where(active, scores, -jnp.inf)
        return jnp.where(active.any(), jax.nn.log_softmax(scores, axis=-1), -jnp.inf)


def _uniform(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A task key ~ U(-1, 1)."""
    return jax.random.uniform(rng, shape, dtype, -1.0, 1.0)
