"""T5: an encoder-decoder with RMSNorm and relative position biases, `nn.scan` over the layers.

One module for T5 1.0 (ReLU, tied and scaled head), 1.1 and its LM-adapted and FLAN descendants (gated GELU,
untied head), mT5 and umT5 (arXiv 1910.10683, 2002.05202, 2010.11934). The inner width heads * head_dim need
not equal d_model.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sapt_jax.models.layers import (
    Attention,
    Embedding,
    GatedMlp,
    LogitsDense,
    Mlp,
    RMSNorm,
    drop,
    first_layers,
    part,
    scan_layers,
)
from sapt_jax.models.relative_bias import RelativeBias, look_up, relative_buckets
from sapt_jax.models.shapes import T5Config
from sapt_jax.pet import Mixture, at_tokens, layer_blocks, put_prompt_before
from sapt_jax.sharding import CACHE, CROSS_CACHE, STATES, constrain

START_ID = 0

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu_new": nn.gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
}


@struct.dataclass
class Cache:
    """What the decoder of one batch keeps between steps.

    Attributes:
      key, value: [layers, B, S, N, H] of the decoder's own tokens, S = new tokens + 1 for the start id.
      cross_key, cross_value: [layers, B, N, H, S'] of the encoded source, read only; S' = prompt and source length.
        The length is last since TPUs pad that axis to 128, and most T5s have a head_dim of 64.
      source_mask: [B, S'] bool.
      column: [] int, the column that the next token is written to.
    """

    key: jax.Array
    value: jax.Array
    cross_key: jax.Array
    cross_value: jax.Array
    source_mask: jax.Array
    column: jax.Array

    # The axis of rows, of arrays that differ between several answers to one source, and of those that do not.
    answer_axes = {"key": 1, "value": 1}
    source_axes = {"cross_key": 1, "cross_value": 1, "source_mask": 0}


def _mlp(config: T5Config, dtype: Any, dropout: float) -> nn.Module:
    return (GatedMlp if config.gated else Mlp)(config.d_ff, ACTIVATIONS[config.activation], dtype, dropout)


def _attention(config: T5Config, dtype: Any, dropout: float) -> Attention:
    heads = config.num_heads
    return Attention(heads, heads, config.head_dim, config.d_model, scale=1.0, dtype=dtype, dropout=dropout)


class EncoderBlock(nn.Module):
    """One pre-norm encoder layer."""

    config: T5Config
    dtype: Any
    dropout: float

    def setup(self):
        c = self.config
        self.pre_attention_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.attention = _attention(c, self.dtype, self.dropout)
        self.pre_mlp_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.mlp = _mlp(c, self.dtype, self.dropout)

    def __call__(self, x: jax.Array, blocks: Any, bias: jax.Array, pet: Any, buckets: jax.Array, mask: jax.Array):
        """Applies the layer.

        Args:
          x: [B, L, D].
          blocks: this layer's LoRA blocks, or None.
          bias: [1, N, L, L], or this layer's table [N, buckets].
          pet: what all layers share of the mixture, or None.
          buckets: [L, L].
          mask: [B, 1, 1, L] bool.
        """
        bias = look_up(bias, buckets) if self.config.bias_per_layer else bias
        attention_blocks = part(blocks, "attention")
        h = self.pre_attention_layer_norm(x)
        query = self.attention.project_query(h, attention_blocks, pet)
        key, value = self.attention.project_key_value(h, attention_blocks, pet)
        attended = self.attention.attend(query, key, value, mask, bias)
        x = x + drop(self, self.dropout, self.attention.project_out(attended, attention_blocks, pet))
        x = x + drop(self, self.dropout, self.mlp(self.pre_mlp_layer_norm(x), part(blocks, "mlp"), pet))
        return constrain(x, *STATES), None


class DecoderBlock(nn.Module):
    """One pre-norm decoder layer over the scan's carry."""

    config: T5Config
    dtype: Any
    dropout: float

    def setup(self):
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.self_attention = _attention(c, self.dtype, self.dropout)
        self.pre_cross_attention_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.encoder_decoder_attention = _attention(c, self.dtype, self.dropout)
        self.pre_mlp_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.mlp = _mlp(c, self.dtype, self.dropout)

    def __call__(self, carry, blocks, bias, cross, pet, buckets, mask, encoded, source_mask, write):
        """Applies the layer.

        Args:
          carry: (x [B, L, D], cached key, cached value, layer index); the cached arrays are
            [layers, B, S, N, H] or None.
          blocks: this layer's LoRA blocks, or None.
          bias: [1, N, L, S], or this layer's table [N, buckets].
          cross: this layer's (key, value) [B, N, H, source length], or None to project `encoded`.
          pet: what all layers share of the mixture, or None.
          buckets: [L, S].
          mask: [1, 1, L, S] bool.
          encoded: the encoder's states [B, source length, D], or None where `cross` is given.
          source_mask: [B, 1, 1, source length] bool.
          write: cache column that the tokens of x are written to, or None without a cache.

        Returns:
          The new carry, and `cross` where it was projected for a cache.
        """
        x, cached_key, cached_value, layer = carry
        self_blocks, cross_blocks = part(blocks, "self_attention"), part(blocks, "encoder_decoder_attention")
        bias = look_up(bias, buckets) if self.config.bias_per_layer else bias

        h = self.pre_self_attention_layer_norm(x)
        query = self.self_attention.project_query(h, self_blocks, pet)
        key, value = self.self_attention.project_key_value(h, self_blocks, pet)
        if write is not None:
            start = (layer, 0, write, 0, 0)
            cached_key = jax.lax.dynamic_update_slice(cached_key, key[None], start)
            cached_value = jax.lax.dynamic_update_slice(cached_value, value[None], start)
            key = jax.lax.dynamic_index_in_dim(cached_key, layer, keepdims=False)
            value = jax.lax.dynamic_index_in_dim(cached_value, layer, keepdims=False)
        attended = self.self_attention.attend(query, key, value, mask, bias)
        x = x + drop(self, self.dropout, self.self_attention.project_out(attended, self_blocks, pet))

        h = self.pre_cross_attention_layer_norm(x)
        query = self.encoder_decoder_attention.project_query(h, cross_blocks, pet)
        projected = None
        if cross is None:
            of_source = at_tokens(pet, source_mask[:, 0, 0])
            key, value = self.encoder_decoder_attention.project_key_value(encoded, cross_blocks, of_source)
            projected = None if write is None else tuple(jnp.moveaxis(y, 1, -1) for y in (key, value))
        else:
            key, value = (jnp.moveaxis(y, -1, 1) for y in cross)
        attended = self.encoder_decoder_attention.attend(query, key, value, source_mask)
        attended = self.encoder_decoder_attention.project_out(attended, cross_blocks, pet)
        x = x + drop(self, self.dropout, attended)

        x = x + drop(self, self.dropout, self.mlp(self.pre_mlp_layer_norm(x), part(blocks, "mlp"), pet))
        x = constrain(x, *STATES)
        return (x, cached_key, cached_value, layer + 1), projected


class Encoder(nn.Module):
    """All encoder layers and the final norm."""

    config: T5Config
    dtype: Any
    remat: str
    dropout: float

    def setup(self):
        c = self.config
        self.relpos_bias = RelativeBias(c, c.num_encoder_layers)
        axes = (0, 0 if c.bias_per_layer else nn.broadcast, *[nn.broadcast] * 3)
        self.layers = scan_layers(EncoderBlock, c.num_encoder_layers, axes, self.remat)(c, self.dtype, self.dropout)
        self.encoder_norm = RMSNorm(c.norm_eps, self.dtype)

    def __call__(self, x: jax.Array, mask: jax.Array, pet: Mixture | None) -> jax.Array:
        """x [B, L, D], mask [B, L] -> normed states [B, L, D]."""
        blocks, shared = layer_blocks(pet, "encoder", "layers")
        buckets, bias = self._positions(x.shape[1])
        x = drop(self, self.dropout, x)
        x, _ = self.layers(x, blocks, bias, shared, buckets, mask[:, None, None, :])
        return drop(self, self.dropout, self.encoder_norm(x))

    def first(self, count: int, x: jax.Array, mask: jax.Array) -> jax.Array:
        """What the first `count` bare layers make of x [B, L, D], before any final norm."""
        c = self.config
        buckets, bias = self._positions(x.shape[1])
        own, whole = ((bias,), ()) if c.bias_per_layer else ((), (bias,))
        rest = (None, buckets, mask[:, None, None, :])
        block = EncoderBlock(c, self.dtype, 0.0, parent=None)
        params = self.layers.variables["params"]
        return first_layers(block, params, count, x, (None, *own), *whole, *rest)

    def _positions(self, length: int) -> tuple[jax.Array, jax.Array]:
        """Buckets [L, L] of distances, and the bias of them, or the layers' tables of it."""
        c, positions = self.config, jnp.arange(length)
        distance = positions[None, :] - positions[:, None]
        buckets = relative_buckets(distance, True, c.relative_buckets, c.relative_max_distance)
        return buckets, self.relpos_bias(buckets)


class Decoder(nn.Module):
    """All decoder layers, the final norm and, where untied, the output head."""

    config: T5Config
    dtype: Any
    remat: str
    dropout: float

    def setup(self):
        c = self.config
        self.relpos_bias = RelativeBias(c, c.num_decoder_layers)
        axes = (0, 0 if c.bias_per_layer else nn.broadcast, 0, *[nn.broadcast] * 6)
        self.layers = scan_layers(DecoderBlock, c.num_decoder_layers, axes, self.remat)(c, self.dtype, self.dropout)
        self.decoder_norm = RMSNorm(c.norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.logits_dense = LogitsDense(c.vocab_size, self.dtype)

    def __call__(self, x, encoded, source_mask, pet, cached=None, cross=None, write=None):
        """Decodes x [B, L, D] after what is cached.

        Args:
          x: embedded tokens.
          encoded: [B, source length, D], or None where `cross` is given.
          source_mask: [B, source length] bool.
          pet: the mixture, or None.
          cached: (key, value) [layers, B, S, N, H], or None without a cache.
          cross: (key, value) of the source [layers, B, N, H, source length], or None.
          write: [] int, the column of x's first token, with a cache.

        Returns:
          (normed states [B, L, D], cached key and value, cross key and value where they were projected).
        """
        c = self.config
        blocks, shared = layer_blocks(pet, "decoder", "layers")
        length = x.shape[1]
        positions = jnp.arange(length) + (0 if write is None else write)
        columns = jnp.arange(length if cached is None else cached[0].shape[2])
        distance = columns[None, :] - positions[:, None]
        buckets = relative_buckets(distance, False, c.relative_buckets, c.relative_max_distance)
        bias = self.relpos_bias(buckets)
        mask = (distance <= 0)[None, None]
        x = drop(self, self.dropout, x)
        carry = (x, *(cached or (None, None)), jnp.zeros((), jnp.int32))
        (x, key, value, _), projected = self.layers(
            carry, blocks, bias, cross, shared, buckets, mask, encoded, source_mask[:, None, None, :], write
        )
        return drop(self, self.dropout, self.decoder_norm(x)), (key, value), projected


class T5(nn.Module):
    """The model. With `pet=None` it is the plain pretrained model, and its tree holds nothing else.

    Where it is applied with a "dropout" rng it drops at the rate `dropout`, at every place where the pretrained model
    did: embeddings, attention weights, residual branches, the hidden layer of the MLP, and the states after the final
    norms. Without one it drops nothing.
    """

    config: T5Config
    dtype: Any
    remat: str
    dropout: float = 0.0

    padding_side = "right"

    def setup(self):
        c = self.config
        self.token_embedder = Embedding(c.vocab_size, c.d_model, self.dtype)
        self.encoder = Encoder(c, self.dtype, self.remat, self.dropout)
        self.decoder = Decoder(c, self.dtype, self.remat, self.dropout)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings [B, L, D], as the shared attention pools them."""
        return self.token_embedder(ids)

    def encode(self, source: jax.Array, source_mask: jax.Array, layers: int | None = None) -> jax.Array:
        """What the encoder makes of a source by itself: its last hidden states [B, S, D], after the final norm.

        With a number of `layers`, the states after so many, or after all where there are fewer, before any final norm.
        """
        if layers is None:
            return self.encoder(self.embed(source), source_mask, None)
        return self.encoder.first(min(layers, self.config.num_encoder_layers), self.embed(source), source_mask)

    def logits(self, states: jax.Array) -> jax.Array:
        """Normed decoder states [B, L, D] -> [B, L, V] float32."""
        c = self.config
        if c.tie_embeddings if c.scale_outputs is None else c.scale_outputs:
            states = states * c.d_model**-0.5
        return self.token_embedder.attend(states) if c.tie_embeddings else self.decoder.logits_dense(states)

    def __call__(
        self,
        source: jax.Array,
        source_mask: jax.Array,
        target: jax.Array,
        target_mask: jax.Array,
        pet: Mixture | None = None,
    ) -> jax.Array:
        """Teacher-forced logits of the answer.

        Args:
          source: [B, S] ids, right-padded; source_mask: [B, S] bool.
          target: [B, L] ids, right-padded; target_mask: [B, L] bool. No token sees the padding after it.
          pet: the mixture of PET blocks, or None.

        Returns:
          [B, L, V] float32; position j predicts target[:, j].
        """
        x, source_mask = put_prompt_before(pet, self.embed(source), source_mask)
        encoded = self.encoder(x, source_mask, at_tokens(pet, source_mask))
        shifted = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=START_ID)
        states, _, _ = self.decoder(self.embed(shifted), encoded, source_mask, at_tokens(pet, target_mask))
        return self.logits(states)

    def prefill(
        self, source: jax.Array, source_mask: jax.Array, new_tokens: int, pet: Mixture | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads the source.

        Returns:
          (logits [B, V] of the first answer token, a cache with room for `new_tokens`).
        """
        c = self.config
        x, source_mask = put_prompt_before(pet, self.embed(source), source_mask)
        encoded = self.encoder(x, source_mask, pet)
        start = self.embed(jnp.full((source.shape[0], 1), START_ID, source.dtype))
        shape = (c.num_decoder_layers, source.shape[0], new_tokens + 1, c.num_heads, c.head_dim)
        empty = constrain(jnp.zeros(shape, self.dtype), *CACHE)
        states, (key, value), (cross_key, cross_value) = self.decoder(
            start, encoded, source_mask, pet, cached=(empty, empty), write=jnp.zeros((), jnp.int32)
        )
        cross_key, cross_value = (constrain(x, *CROSS_CACHE) for x in (cross_key, cross_value))
        cache = Cache(key, value, cross_key, cross_value, source_mask, jnp.ones((), jnp.int32))
        return self.logits(states)[:, 0], cache

    def decode_step(self, tokens: jax.Array, cache: Cache, pet: Mixture | None = None) -> tuple[jax.Array, Cache]:
        """Appends one token [B] to every row; returns the next logits [B, V] and the cache."""
        states, (key, value), _ = self.decoder(
            self.embed(tokens[:, None]),
            None,
            cache.source_mask,
            pet,
            cached=(cache.key, cache.value),
            cross=(cache.cross_key, cache.cross_value),
            write=cache.column,
        )
        return self.logits(states)[:, 0], cache.replace(key=key, value=value, column=cache.column + 1)
