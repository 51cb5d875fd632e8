"""Rotary position embeddings in Hugging Face's rotate-half convention, with its frequency scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.models.shapes import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dimensions [H / 2], and the factor on cosine and sine.

    "linear" divides all frequencies; "llama3" (Llama 3.1's release) divides the long wavelengths and blends between;
    "yarn" (arXiv 2309.00071) blends by the number of rotations over the original context and raises the attention
    temperature.
    """
    half = np.arange(0, config.head_dim, 2, dtype=np.float64)
    frequencies = config.rope_theta ** -(half / config.head_dim)
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return frequencies, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return frequencies / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_positions
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * frequencies / factor + smooth * frequencies, 1.0

    def dimension_of(rotations: float) -> float:
        return config.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_of(scaling.get("beta_slow") or 1)), config.head_dim - 1)
    ramp = np.clip((np.arange(config.head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    attention = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    return frequencies / factor * ramp + frequencies * (1 - ramp), attention


def rotations(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, L, 1, H / 2] in float32 for integer positions [B, L]."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, L, N, H] by the angles of its positions."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)
