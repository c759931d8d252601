"""Matrix products inside of Pallas-Triton kernels."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# The least rows, columns and inputs of a product.
LEAST = 16


def make_dot(interpret: bool) -> Callable[..., Array]:
    """Returns a function that multiplies matrices of numbers rounded to a dtype, and sums in float32.

    Products of float32 are three of 11 bits each on the matrix units of a GPU, which are exact to 2^-21 or so; a CPU
    has products of float32.
    """
    of_float32 = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def dot(a: Array, b: Array, dtype: Any) -> Array:
        precision = of_float32 if dtype == jnp.float32 else lax.Precision.DEFAULT
        return jnp.dot(a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)

    return dot
