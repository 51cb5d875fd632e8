"""Causal self-attention over a padded batch, by the kernel that suits the devices of the mesh in force."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from sapt_jax.partitioning import KEY_VALUE, QUERY, TOKENS, divides, spec_of

KERNELS = ("auto", "xla", "splash", "cudnn")

# The splash kernel takes positions in blocks of a multiple of 128, and needs no longer ones than 1024.
BLOCK_STEP = 128
LONGEST_BLOCK = 1024


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, scale: float, kernel: str
) -> jax.Array:
    """softmax(query . key * scale) value, where each token sees the valid ones up to itself.

    Args:
      query: [B, L, N, H]; key, value: [B, L, K, H], with N a multiple of K.
      valid: [B, L] bool. What comes out at other places is finite and means nothing.
      kernel: "xla"; "splash", for TPUs, or "cudnn", for NVIDIA GPUs, neither of which holds [L, L] scores in memory;
        or "auto", which is splash on TPUs and xla elsewhere.

    Returns:
      [B, L, N, H].
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    if kernel == "auto":
        # The compiler splits heads that the mesh does not divide; a kernel has to have whole ones.
        whole = mesh.empty or (divides(mesh, query.shape, QUERY) and divides(mesh, key.shape, KEY_VALUE))
        kernel = "splash" if platform == "tpu" and whole else "xla"
    if kernel != "splash":
        # cuDNN takes no mask that is broadcast along the queries.
        mask = jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, valid.shape[1], valid.shape[1]))
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, scale=scale, implementation=kernel
        )
    attend = functools.partial(_splash, scale=scale, interpret=platform != "tpu")
    if not mesh.empty:
        # Each device runs the kernel on its own rows and heads.
        query_spec, key_spec, valid_spec = (spec_of(axes) for axes in (QUERY, KEY_VALUE, TOKENS))
        specs = (query_spec, key_spec, key_spec, valid_spec)
        attend = jax.shard_map(attend, in_specs=specs, out_specs=query_spec, check_vma=False)
    return attend(query, key, value, valid)


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, scale: float, interpret: bool
) -> jax.Array:
    """`causal_attention` of the rows and heads of one device, by JAX's splash kernel (arXiv 2205.14135)."""
    length = query.shape[1]
    padded = -(-length // BLOCK_STEP) * BLOCK_STEP
    block = max(size for size in range(BLOCK_STEP, LONGEST_BLOCK + 1, BLOCK_STEP) if padded % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.CausalMask((padded, padded))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    # Padding is a segment of its own: tokens do not see it, and it sees something, so that nothing divides by zero.
    segments = jnp.pad(valid, ((0, 0), (0, padded - length))).astype(jnp.int32)
    mixed = jax.vmap(kernel)(
        heads_first(query * jnp.asarray(scale, query.dtype)),
        heads_first(key),
        heads_first(value),
        splash_attention_kernel.SegmentIds(segments, segments),
    )
    return mixed.swapaxes(1, 2)[:, :length]
