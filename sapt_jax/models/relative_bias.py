"""T5's relative position biases (arXiv 1910.10683, section 2.1)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.models.shapes import T5Config


def relative_buckets(distance: jax.Array, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """Bucket of each distance key position - query position (any shape, int).

    Half of the buckets (of each direction, if bidirectional) hold one distance each, the others grow
    logarithmically up to `max_distance`, and the last holds all that is further. Without `bidirectional`
    every later key counts as distance 0.
    """
    if bidirectional:
        buckets //= 2
    exact = buckets // 2
    # A table, since accelerators' logarithms may round a distance at a bucket's edge to the other side. The
    # epsilon is T5X's.
    far = np.arange(exact, max_distance + 1, dtype=np.float32) / exact + np.finfo(np.float32).eps
    growth = (np.log(far) / math.log(max_distance / exact) * (buckets - exact)).astype(np.int32)
    table = np.concatenate([np.arange(exact), np.minimum(exact + growth, buckets - 1)])
    magnitude = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    bucket = jnp.asarray(table, jnp.int32)[jnp.minimum(magnitude, max_distance)]
    return jnp.where(distance > 0, bucket + buckets, bucket) if bidirectional else bucket


class RelativeBias(nn.Module):
    """A stack's relative position biases: a table [N, buckets], or one for each layer [layers, N, buckets]."""

    config: T5Config
    num_layers: int

    @nn.compact
    def __call__(self, buckets: jax.Array) -> jax.Array:
        """The bias [1, N, L, S] at buckets [L, S] that all layers share, or the tables that they look it up in."""
        c = self.config
        shape, axes = (c.num_heads, c.relative_buckets), ("heads", None)
        if c.bias_per_layer:
            shape, axes = (self.num_layers, *shape), ("layers", *axes)
        init = nn.with_logical_partitioning(nn.initializers.normal(c.d_model**-0.5), axes)
        table = self.param("rel_embedding", init, shape, jnp.float32)
        return table if c.bias_per_layer else look_up(table, buckets)


def look_up(table: jax.Array, buckets: jax.Array) -> jax.Array:
    """The bias [1, N, L, S] in float32 of a table [N, buckets] at buckets [L, S]."""
    return jnp.take(table.astype(jnp.float32), buckets, axis=1)[None]
