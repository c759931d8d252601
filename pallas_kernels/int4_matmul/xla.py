"""INT4 matmul in plain JAX: dequantise, then one matrix product with float32 accumulation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int4

from pallas_kernels.formats.int4 import dequantize_int4


def int4_matmul(
    x: Float[Array, "M K"], codes: Int4[Array, "K N"], scales: Float[Array, "groups N"]
) -> Float[Array, "M N"]:
    """See `api.int4_matmul`."""
    weights = dequantize_int4(codes, jax.lax.stop_gradient(scales), x.dtype)
    product = jnp.dot(x, weights, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
