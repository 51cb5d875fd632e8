"""Layers that T5 and LLaMA share. Parameters are float32 or bfloat16, compute is `dtype` with float32 accumulation."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapt_jax.models.kernels import causal_attention
from sapt_jax.sharding import HIDDEN, KEY_VALUE, LOGITS, QUERY, STATES, constrain

# What adapted projections say of their inputs where this collection is asked for: at PATH/input the sum over tokens of
# x x^T [layers, D, D].
MOMENTS = "moments"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, kernel: jax.Array, dtype: Any, out_dtype: Any) -> jax.Array:
    """x [..., D] @ kernel [D, F] with operands in `dtype`, accumulated in float32, returned in `out_dtype`.

    The gradient casts the cotangent to `dtype` as well: the automatic one would upcast the kernel to float32 and leave
    the fast bfloat16 units.
    """
    return _contract(x, kernel, ((x.ndim - 1,), (0,)), dtype).astype(out_dtype)


def _contract(x, y, dimensions, dtype):
    return jax.lax.dot_general(
        x.astype(dtype), y.astype(dtype), (dimensions, ((), ())), preferred_element_type=jnp.float32
    )


def _matmul_forward(x, kernel, dtype, out_dtype):
    return matmul(x, kernel, dtype, out_dtype), (x, kernel)


def _matmul_backward(dtype, out_dtype, residuals, cotangent):
    x, kernel = residuals
    leading = tuple(range(x.ndim - 1))
    dx = _contract(cotangent, kernel, ((cotangent.ndim - 1,), (1,)), dtype)
    dkernel = _contract(x, cotangent, (leading, leading), dtype)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def lora_delta(x: jax.Array, block: dict[str, jax.Array], pet: Any, dtype: Any) -> jax.Array:
    """((x A) * columns) B: x [B, L, D], A [D, T*R], columns [B, T*R], B [T*R, H] -> [B, L, H]."""
    z = matmul(x, block["a"], dtype, dtype)
    if pet.slot_columns is not None:
        z = jnp.where(pet.slot_columns, z, jax.lax.stop_gradient(z))
    return matmul(z * pet.columns[:, None, :].astype(dtype), block["b"], dtype, dtype)


def second_moment(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """The sum [D, D] of x x^T over the tokens among x [B, L, D], in float32."""
    x = jnp.where(tokens[..., None], x.astype(jnp.float32), 0.0)
    return jnp.einsum("BLD,BLE->DE", x, x, precision=jax.lax.Precision.HIGHEST)


def input_of(site: tuple[str, ...]) -> tuple[str, ...]:
    """A name, as a path, of what the projection at a path of the base tree reads; those that read the same share it."""
    *module, name = site
    if name in ("key", "value") and module[-1] == "encoder_decoder_attention":
        return (*module, "encoded")
    return (*module, "states" if name in ("query", "key", "value", "wi", "wi_0", "wi_1") else name)


def drop(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    """x, entries set to zero at `rate` and the others divided by 1 - rate, in a module applied with a "dropout" rng.

    Without one, or at rate 0, it is x itself.
    """
    if not rate or not module.has_rng("dropout"):
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def part(blocks: Any, name: str) -> Any:
    """The LoRA blocks of one part of a module, or None where it has none."""
    return None if blocks is None else blocks.get(name)


class Dense(nn.Module):
    """A projection without bias, plus the mixture of LoRA blocks where one is given."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, block: dict[str, jax.Array] | None = None, pet: Any = None) -> jax.Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = matmul(x, kernel, self.dtype, self.dtype)
        if block is not None:
            y = y + lora_delta(x, block, pet, self.dtype)
            if self.is_mutable_collection(MOMENTS):
                self.sow(MOMENTS, "input", second_moment(x, pet.tokens), jnp.add, lambda: 0.0)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class Embedding(nn.Module):
    """The token table [V, D]; `attend` is the tied output head."""

    vocab_size: int
    features: int
    dtype: Any

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [B, L] -> [B, L, D] in `dtype`."""
        # Rows that are split would come out of the look-up split, and have to be whole again for every token.
        table = constrain(self.embedding, "vocab", "act_embed")
        return constrain(jnp.take(table, ids, axis=0).astype(self.dtype), *STATES)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [B, L, D] -> logits [B, L, V] in float32."""
        return constrain(matmul(x, self.embedding.T, self.dtype, jnp.float32), *LOGITS)


class LogitsDense(nn.Module):
    """An untied output head [D, V] with float32 logits."""

    vocab_size: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
        kernel = self.param("kernel", init, (x.shape[-1], self.vocab_size), jnp.float32)
        return constrain(matmul(x, kernel, self.dtype, jnp.float32), *LOGITS)


class GatedMlp(nn.Module):
    """wo(dropped(activation(wi_0 x) * wi_1 x))."""

    d_ff: int
    activation: Callable
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, blocks: Any = None, pet: Any = None) -> jax.Array:
        gate = Dense(self.d_ff, ("embed", "mlp"), self.dtype, name="wi_0")(x, part(blocks, "wi_0"), pet)
        up = Dense(self.d_ff, ("embed", "mlp"), self.dtype, name="wi_1")(x, part(blocks, "wi_1"), pet)
        hidden = constrain(self.activation(gate) * up, *HIDDEN)
        hidden = drop(self, self.dropout, hidden)
        return Dense(x.shape[-1], ("mlp", "embed"), self.dtype, name="wo")(hidden, part(blocks, "wo"), pet)


class Mlp(nn.Module):
    """wo(dropped(activation(wi x)))."""

    d_ff: int
    activation: Callable
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, blocks: Any = None, pet: Any = None) -> jax.Array:
        hidden = Dense(self.d_ff, ("embed", "mlp"), self.dtype, name="wi")(x, part(blocks, "wi"), pet)
        hidden = constrain(self.activation(hidden), *HIDDEN)
        hidden = drop(self, self.dropout, hidden)
        return Dense(x.shape[-1], ("mlp", "embed"), self.dtype, name="wo")(hidden, part(blocks, "wo"), pet)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, and LoRA on the projections that have blocks.

    `kernel` is what `causal_attention` runs; `dropout` is that of the weights that `attend` mixes with. The steps are
    separate so that a caller can rotate, cache or reuse parts: `project_query`, `project_key_value`, then `attend` or
    `attend_causally`, then `project_out`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_model: int
    scale: float
    dtype: Any
    kernel: str = "xla"
    dropout: float = 0.0

    def setup(self):
        kv_width = self.num_kv_heads * self.head_dim
        # Whatever the scale, a fresh model's attention logits have about unit variance: T5 folds 1/sqrt(H) into it.
        query_init = nn.initializers.variance_scaling(
            (self.head_dim**-0.5 / self.scale) ** 2, "fan_in", "truncated_normal"
        )
        self.query = Dense(self.num_heads * self.head_dim, ("embed", "heads"), self.dtype, query_init)
        self.key = Dense(kv_width, ("embed", "kv_heads"), self.dtype)
        self.value = Dense(kv_width, ("embed", "kv_heads"), self.dtype)
        self.out = Dense(self.d_model, ("heads", "embed"), self.dtype)

    def project_query(self, x: jax.Array, blocks: Any, pet: Any) -> jax.Array:
        """x [B, L, D] -> [B, L, N, H]."""
        y = self.query(x, part(blocks, "query"), pet)
        return constrain(y.reshape(*x.shape[:2], self.num_heads, self.head_dim), *QUERY)

    def project_key_value(self, x: jax.Array, blocks: Any, pet: Any) -> tuple[jax.Array, jax.Array]:
        """x [B, S, D] -> keys and values, each [B, S, K, H]."""
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        key = self.key(x, part(blocks, "key"), pet)
        value = self.value(x, part(blocks, "value"), pet)
        return constrain(key.reshape(shape), *KEY_VALUE), constrain(value.reshape(shape), *KEY_VALUE)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None
    ) -> jax.Array:
        """softmax(query . key * scale + bias) value, [B, L, N, H].

        Args:
          query: [B, L, N, H]; key, value: [B, S, K, H].
          mask: broadcastable to [B, 1, L, S], True where attention is allowed, or None.
          bias: broadcastable to [B, N, L, S], or None.
        """
        if not self.dropout or not self.has_rng("dropout"):
            return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=self.scale)
        if self.num_heads != self.num_kv_heads:
            raise ValueError("dropped attention weights need as many heads of keys as of queries")
        scores = self.scale * jnp.einsum("BLNH,BSNH->BNLS", query, key, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias
        # Finite, so that a row without tokens has a softmax.
        scores = scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = drop(self, self.dropout, jax.nn.softmax(scores, axis=-1).astype(value.dtype))
        return jnp.einsum("BNLS,BSNH->BLNH", weights, value)

    def attend_causally(self, query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array) -> jax.Array:
        """As `attend` of a batch to itself: each token sees those of valid [B, L] up to itself."""
        return causal_attention(query, key, value, valid, self.scale, self.kernel)

    def project_out(self, attended: jax.Array, blocks: Any, pet: Any) -> jax.Array:
        """attended [B, L, N, H] -> [B, L, D]."""
        return self.out(attended.reshape(*attended.shape[:2], -1), part(blocks, "out"), pet)


# What a backward pass computes again, by name; under "none", nothing.
_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
REMAT = ("none", *_REMAT_POLICIES)


def scan_layers(block: type[nn.Module], length: int, in_axes: Any, remat: str) -> Callable:
    """`length` copies of `block` under one `nn.scan`, parameters stacked on a leading "layers" axis.

    Args:
      block: module with `__call__(carry, *inputs) -> (carry, outputs)`.
      in_axes: scan axis of each input, `nn.broadcast` for those that every layer shares.
      remat: one of `REMAT`: "none", "full" (recompute everything) or "dots" (keep matrix products).

    Raises:
      ValueError: an unknown remat.
    """
    if remat not in REMAT:
        *others, last = map(repr, REMAT)
        raise ValueError(f"config.model.remat={remat!r} is unknown; choose {', '.join(others)} or {last}.")
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=_REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, MOMENTS: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def first_layers(block: nn.Module, params: Any, count: int, carry: Any, scanned: Any, *shared: Any) -> Any:
    """The carry after the first `count` layers of a stack made by `scan_layers`; no other layer is computed.

    Args:
      block: one layer, unbound (`parent=None`).
      params: of the stack, each with the axis of layers first.
      scanned: inputs of which every layer has its own, in the same way.
      shared: inputs that follow them.
    """

    def layer(number: jax.Array, carry: Any) -> Any:
        # An index into the stack, since a slice of it would be a copy.
        own, inputs = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), (params, scanned))
        return block.apply({"params": own}, carry, *inputs, *shared)[0]

    return jax.lax.fori_loop(0, count, layer, carry)
