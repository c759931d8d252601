"""Matrix product in plain JAX, with float32 accumulation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.formats import Dense, Weight


def dense_matmul(x: Float[Array, "*batch K"], weight: Dense) -> Float[Array, "*batch N"]:
    """Multiplies at the platform's own precision, as the rest of a model is multiplied; returns float32."""
    return jnp.einsum("...i,oi->...o", x, weight.weight, preferred_element_type=jnp.float32)


def dequantized_matmul(x: Float[Array, "M K"], weight: Weight) -> Float[Array, "M N"]:
    """Dequantises a weight, whose parts are constants, and multiplies exactly to x's dtype; returns that."""
    matrix = jax.lax.stop_gradient(weight).dequantize(x.dtype).T
    product = jnp.dot(x, matrix, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
