"""A LLaMA-family decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, `nn.scan` over the layers.

Source and answer are separate arguments. The source is left-padded, so that the answer starts at the same column in
every row: logits are computed for the answer's positions only, and decoding appends to one column for the whole batch.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sapt_jax.models.layers import Attention, Embedding, GatedMlp, LogitsDense, RMSNorm, first_layers, part, scan_layers
from sapt_jax.models.rope import rotate, rotations
from sapt_jax.models.shapes import LlamaConfig
from sapt_jax.pet import Mixture, at_tokens, layer_blocks, put_prompt_before
from sapt_jax.sharding import CACHE, STATES, constrain

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


@struct.dataclass
class Cache:
    """Keys and values of one decoded batch.

    Attributes:
      key, value: [layers, B, S, K, H], S = prompt length + source length + new tokens.
      mask: [B, S] bool, True on written columns that hold a token.
      position: [B] int, the position of the next token of each row.
      column: [] int, the column that the next token is written to.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    position: jax.Array
    column: jax.Array

    # The axis of rows, of arrays that differ between several answers to one source, and of those that do not.
    answer_axes = {"key": 1, "value": 1}
    source_axes = {"mask": 0, "position": 0}


class Block(nn.Module):
    """One pre-norm decoder layer over the scan's carry."""

    config: LlamaConfig
    dtype: Any
    kernel: str

    def setup(self):
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.self_attention = Attention(
            c.num_heads, c.num_kv_heads, c.head_dim, c.d_model, c.head_dim**-0.5, self.dtype, self.kernel
        )
        self.pre_mlp_layer_norm = RMSNorm(c.norm_eps, self.dtype)
        self.mlp = GatedMlp(c.d_ff, ACTIVATIONS[c.activation], self.dtype)

    def __call__(self, carry, blocks, pet, rotation, valid, write):
        """Applies the layer.

        Args:
          carry: (x [B, L, D], cached key, cached value, layer index); cached arrays are [layers, B, S, K, H] or None.
          blocks: this layer's LoRA blocks, or None.
          pet: what all layers share of the mixture, or None.
          rotation: cosine and sine at the positions of x.
          valid: [B, S] bool, True where keys are of tokens.
          write: cache column that the tokens of x are written to, or None without a cache.

        Returns:
          The new carry, and this layer's (key, value) [B, L, K, H].
        """
        x, cached_key, cached_value, layer = carry
        attention_blocks = part(blocks, "self_attention")
        h = self.pre_self_attention_layer_norm(x)
        query = rotate(self.self_attention.project_query(h, attention_blocks, pet), rotation)
        key, value = self.self_attention.project_key_value(h, attention_blocks, pet)
        key = rotate(key, rotation)
        if write is None:
            attended = self.self_attention.attend_causally(query, key, value, valid)
        else:
            start = (layer, 0, write, 0, 0)
            cached_key = jax.lax.dynamic_update_slice(cached_key, key[None], start)
            cached_value = jax.lax.dynamic_update_slice(cached_value, value[None], start)
            all_keys = jax.lax.dynamic_index_in_dim(cached_key, layer, keepdims=False)
            all_values = jax.lax.dynamic_index_in_dim(cached_value, layer, keepdims=False)
            attended = self.self_attention.attend(query, all_keys, all_values, valid[:, None, None, :])
        x = x + self.self_attention.project_out(attended, attention_blocks, pet)
        x = x + self.mlp(self.pre_mlp_layer_norm(x), part(blocks, "mlp"), pet)
        x = constrain(x, *STATES)
        return (x, cached_key, cached_value, layer + 1), (key, value)


class Decoder(nn.Module):
    """All layers, the final norm and, where untied, the output head."""

    config: LlamaConfig
    dtype: Any
    remat: str
    kernel: str

    def setup(self):
        c = self.config
        axes = (0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = scan_layers(Block, c.num_layers, axes, self.remat)(c, self.dtype, self.kernel)
        self.decoder_norm = RMSNorm(c.norm_eps, self.dtype)
        if not c.tie_embeddings:
            self.logits_dense = LogitsDense(c.vocab_size, self.dtype)

    def __call__(self, x, positions, valid, pet, cache=None):
        """x [B, L, D] -> (normed states [B, L, D], (keys, values) of these tokens, updated cached keys and values)."""
        blocks, shared = layer_blocks(pet, "decoder", "layers")
        cached = (None, None) if cache is None else (cache.key, cache.value)
        write = None if cache is None else cache.column
        carry = (x, *cached, jnp.zeros((), jnp.int32))
        rotation = rotations(self.config, positions)
        (x, key, value, _), written = self.layers(carry, blocks, shared, rotation, valid, write)
        return self.decoder_norm(x), written, (key, value)

    def first(self, count: int, x: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """What the first `count` bare layers make of x [B, L, D], before any final norm."""
        block = Block(self.config, self.dtype, self.kernel, parent=None)
        carry, rest = (x, None, None, jnp.zeros((), jnp.int32)), (rotations(self.config, positions), valid, None)
        return first_layers(block, self.layers.variables["params"], count, carry, (None,), None, *rest)[0]


class Llama(nn.Module):
    """The language model. With `pet=None` it is the plain pretrained model, and its tree holds nothing else."""

    config: LlamaConfig
    dtype: Any
    remat: str
    kernel: str = "auto"

    padding_side = "left"

    def setup(self):
        c = self.config
        self.token_embedder = Embedding(c.vocab_size, c.d_model, self.dtype)
        self.decoder = Decoder(c, self.dtype, self.remat, self.kernel)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token embeddings [B, L, D], as the shared attention pools them."""
        return self.token_embedder(ids)

    def encode(self, source: jax.Array, source_mask: jax.Array, layers: int | None = None) -> jax.Array:
        """What the model makes of a source by itself: its last hidden states [B, S, D], after the final norm.

        With a number of `layers`, the states after so many, or after all where there are fewer, before any final norm.
        """
        x, positions = self.embed(source), positions_of(source_mask)
        if layers is None:
            return self.decoder(x, positions, source_mask, None)[0]
        return self.decoder.first(min(layers, self.config.num_layers), x, positions, source_mask)

    def logits(self, states: jax.Array) -> jax.Array:
        """Normed states [B, L, D] -> [B, L, V] float32."""
        if self.config.tie_embeddings:
            return self.token_embedder.attend(states)
        return self.decoder.logits_dense(states)

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
          source: [B, S] ids, left-padded; source_mask: [B, S] bool.
          target: [B, L] ids, right-padded; target_mask: [B, L] bool.
          pet: the mixture of PET blocks, or None.

        Returns:
          [B, L, V] float32; position j predicts target[:, j].
        """
        ids = jnp.concatenate([source, target[:, :-1]], axis=1)
        valid = jnp.concatenate([source_mask, target_mask[:, :-1]], axis=1)
        x, valid = put_prompt_before(pet, self.embed(ids), valid)
        states, _, _ = self.decoder(x, positions_of(valid), valid, at_tokens(pet, valid))
        return self.logits(states[:, -target.shape[1] :])

    def prefill(
        self, source: jax.Array, source_mask: jax.Array, new_tokens: int, pet: Mixture | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads the source: the logits [B, V] of the first answer token, and a cache with room for `new_tokens`."""
        x, valid = put_prompt_before(pet, self.embed(source), source_mask)
        states, (key, value), _ = self.decoder(x, positions_of(valid), valid, pet)
        room = ((0, 0), (0, 0), (0, new_tokens), (0, 0), (0, 0))
        cache = Cache(
            key=constrain(jnp.pad(key, room), *CACHE),
            value=constrain(jnp.pad(value, room), *CACHE),
            mask=jnp.pad(valid, ((0, 0), (0, new_tokens))),
            position=valid.sum(axis=1),
            column=jnp.asarray(valid.shape[1], jnp.int32),
        )
        return self.logits(states[:, -1:])[:, 0], cache

    def decode_step(self, tokens: jax.Array, cache: Cache, pet: Mixture | None = None) -> tuple[jax.Array, Cache]:
        """Appends one token [B] to every row; returns the next logits [B, V] and the cache."""
        mask = cache.mask.at[:, cache.column].set(True)
        states, _, (key, value) = self.decoder(self.embed(tokens[:, None]), cache.position[:, None], mask, pet, cache)
        cache = cache.replace(key=key, value=value, mask=mask, position=cache.position + 1, column=cache.column + 1)
        return self.logits(states)[:, 0], cache


def positions_of(valid: jax.Array) -> jax.Array:
    """Positions [B, L] that count tokens only, so that padding on the left does not shift them."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
