"""RMSNorm (arXiv 1910.07467) and LayerNorm, both in float32 and cast back, as the reference rounds them."""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.model.param import Init
from pallas_kernels import rms_norm


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps), cast back to x's dtype, times `weight`."""

    def __init__(self, init: Init, width: int, eps: float, axis: str | None = None):
        self.weight = init.ones((width,), (axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., width] in its own dtype."""
        return rms_norm(x, self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * `weight` + `bias`."""

    def __init__(self, init: Init, width: int, eps: float):
        self.weight = init.ones((width,), (None,))
        self.bias = init.zeros((width,), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., width] in its own dtype."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
