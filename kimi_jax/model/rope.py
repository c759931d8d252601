"""Rotary position embedding (arXiv 2104.09864) with static YaRN scaling (arXiv 2309.00071).

A checkpoint's rotated channels lie in pairs (x0, x1), (x2, x3), ...; the result is de-interleaved, all first members
and then all second ones, the order in which the reference caches `k_pe`. Only dot products of two rotated vectors
matter, so queries and keys need only agree.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.axes import Float, Float32, Int32
from kimi_jax.config import TextConfig, YarnConfig
from pallas_kernels import rotate_pairs


def inv_freq(config: TextConfig) -> np.ndarray:
    """Radians per position of every pair: float32 [qk_rope_head_dim / 2]."""
    d, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    base = theta ** -(np.arange(0, d, 2) / d)
    if yarn is None:
        return base.astype(np.float32)

    def corr(turns: float) -> float:
        return d * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = corr(yarn.beta_fast), corr(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / (high - low or 0.001), 0, 1)
    return (base / yarn.factor * ramp + base * (1 - ramp)).astype(np.float32)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def softmax_scale(config: TextConfig) -> float:
    """Returns qk_head_dim^-1/2, times m² under YaRN with `mscale_all_dim`, for sequences of every length."""
    yarn = None if config.mla_use_nope else config.rope_scaling
    m = 1.0 if yarn is None else _mscale(yarn.factor, yarn.mscale_all_dim)
    return config.qk_head_dim**-0.5 * m * m


def amplitude(yarn: YarnConfig | None) -> float:
    """Returns the factor of cos and sin: 1 for every published Kimi, where `mscale` equals `mscale_all_dim`."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def rotate(x: Float[jax.Array, "... r"], angles: Float32[jax.Array, "... half"], scale: float = 1.0) -> jax.Array:
    """Turns pair i of x by `angles[..., i]` radians: [first members | second members], in x's dtype."""
    return rotate_pairs(x, *_cos_sin(angles, scale))


def _cos_sin(angles: Float32[jax.Array, "... half"], scale: float) -> tuple[jax.Array, jax.Array]:
    cos, sin = scale * jnp.cos(angles), scale * jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def rotation(positions: Int32[jax.Array, "..."], config: TextConfig) -> tuple[jax.Array, jax.Array] | None:
    """Returns cos and sin of each position, float32 [..., qk_rope_head_dim], each pair's twice; None for NoPE."""
    if config.mla_use_nope:
        return None
    angles = positions[..., None].astype(jnp.float32) * inv_freq(config)
    return _cos_sin(angles, amplitude(config.rope_scaling))


def apply(x: Float[jax.Array, "b t h r"], positions: Int32[jax.Array, "b t"], config: TextConfig) -> jax.Array:
    """Rotates heads of width `qk_rope_head_dim` at `positions`; NoPE models (`mla_use_nope`) are left as they are."""
    turn = rotation(positions[:, :, None], config)
    return x if turn is None else rotate_pairs(x, *turn)
