"""RMSNorm (arXiv 1910.07467), alone and of a sum, in plain JAX."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... d"], weight: Float[Array, "d"], eps: float) -> Float[Array, "... d"]:
    """Computes x / sqrt(mean(x²) + eps) in float32, cast back to x's dtype, times `weight`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight


def add_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "T D"],
    weight: Float[Array, "D"],
    block: ArrayLike,
    *,
    eps: float,
    rows: int,
) -> tuple[Float[Array, "T D"], Float[Array, "rows D"]]:
    """See `api.add_norm`."""
    total = x + y
    some = total if rows == len(x) else jax.lax.dynamic_slice_in_dim(total, block * rows, rows)
    return total, rms_norm(some, weight, eps)
