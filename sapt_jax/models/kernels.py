"""Causal self-attention over a padded batch, by the kernel that suits the devices of the mesh in force."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from sapt_jax.sharding import KEY_VALUE, QUERY, divides, spec_of

KERNELS = ("auto", "xla", "splash", "cudnn")
# A CPU interprets the splash kernel, for tests.
PLATFORMS = {"splash": ("tpu", "cpu"), "cudnn": ("gpu", "cuda")}

# The splash kernel takes positions in blocks of a multiple of 128; longer ones than 1024 gain nothing.
BLOCK_STEP = 128
LONGEST_BLOCK = 1024


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, scale: float, kernel: str
) -> jax.Array:
    """softmax(query . key * scale) value, where each token sees the valid ones up to itself.

    Args:
      query: [B, L, N, H]; key, value: [B, L, K, H], with N a multiple of K.
      valid: [B, L] bool. What comes out at other places is finite and means nothing.
      kernel: "xla"; "splash", for TPUs, or "cudnn", for NVIDIA GPUs, which hold no [N, L, L] scores in memory; or
        "auto", which is splash on TPUs and xla elsewhere. Where the mesh does not split the rows or the heads evenly,
        it is xla.

    Returns:
      [B, L, N, H].

    Raises:
      ValueError: the kernel is for other devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    if kernel == "auto":
        kernel = "splash" if platform == "tpu" else "xla"
    if platform not in PLATFORMS.get(kernel, (platform,)):
        raise ValueError(f"config.model.attention={kernel!r} is not for {platform.upper()}s; choose auto.")
    if kernel == "xla" or not (mesh.empty or _splits_evenly(mesh, query, key)):
        mask = valid[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, scale=scale)
    if kernel == "splash":
        attend = functools.partial(_splash, scale=scale, interpret=platform == "cpu")
    else:
        attend = functools.partial(_cudnn, scale=scale)
    if not mesh.empty:
        # Each device runs the kernel on its own rows and heads, at all positions.
        rows, _, heads, _ = spec_of(QUERY)
        split = PartitionSpec(rows, None, heads, None)
        specs = (split, split, split, PartitionSpec(rows, None))
        attend = jax.shard_map(attend, in_specs=specs, out_specs=split, check_vma=False)
    return attend(query, key, value, valid)


def _splits_evenly(mesh: Any, query: jax.Array, key: jax.Array) -> bool:
    """Whether each device has whole rows, and the query heads of the key heads that it has."""
    together = spec_of(QUERY)[2] == spec_of(KEY_VALUE)[2]
    return together and divides(mesh, query.shape, QUERY) and divides(mesh, key.shape, KEY_VALUE)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, scale: float) -> jax.Array:
    """`causal_attention` of the rows and heads of one device, by cuDNN, with a mask of [L, L] for each row."""
    length = query.shape[1]
    # With a mask, cuDNN's gradient needs an even length.
    query, key, value, valid = (_pad(x, length + length % 2) for x in (query, key, value, valid))
    mask = jnp.broadcast_to(valid[:, None, None, :], (len(valid), 1, valid.shape[1], valid.shape[1]))
    mixed = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, scale=scale, implementation="cudnn"
    )
    return mixed[:, :length]


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
    query = query * jnp.asarray(scale, query.dtype)
    query, key, value = (_pad(x, padded).swapaxes(1, 2) for x in (query, key, value))
    # Padding is a segment of its own: tokens do not see it, and it sees something, so that nothing divides by zero.
    segments = _pad(valid, padded).astype(jnp.int32)
    mixed = jax.vmap(kernel)(query, key, value, splash_attention_kernel.SegmentIds(segments, segments))
    return mixed.swapaxes(1, 2)[:, :length]


def _pad(x: jax.Array, length: int) -> jax.Array:
    """Zeros after x [B, L, ...], up to [B, length, ...]."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
