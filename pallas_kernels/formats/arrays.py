"""Arithmetic that NumPy and XLA spell differently, so that codecs are written once for both."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

# Made by NumPy or by JAX.
AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)
BF16 = np.dtype(ml_dtypes.bfloat16)


def namespace(array: AnyArray) -> Any:
    """Returns `numpy` or `jax.numpy`, whichever made the array."""
    return array.__array_namespace__()


def round_to_bf16(array: AnyArray, dtype: DTypeLike = np.float32) -> AnyArray:
    """Rounds numbers to bf16, to nearest and ties to even, and returns them in `dtype`."""
    if isinstance(array, np.ndarray):
        return array.astype(BF16).astype(dtype, copy=False)
    # XLA may drop a float32 -> bf16 -> float32 pair of conversions (excess precision), but not reduce_precision.
    return lax.reduce_precision(array.astype(jnp.float32), exponent_bits=8, mantissa_bits=7).astype(dtype)


def divide(array: AnyArray, divisor: AnyArray | int) -> AnyArray:
    """Returns the quotient of float32 numbers, rounded once; a NumPy array is divided in place."""
    if isinstance(array, np.ndarray):
        return np.divide(array, divisor, out=array, dtype=np.float32)
    # XLA multiplies by the reciprocal of a constant or broadcast divisor, which rounds twice, and on CPU sees through
    # optimization_barrier: a divisor that may differ from number to number is divided by.
    return array / jnp.where(jnp.isnan(array), array, jnp.asarray(divisor, jnp.float32))


def round_within(array: AnyArray, largest: int) -> AnyArray:
    """Rounds to integers, ties to even, and cuts to [-largest, largest]; a NumPy array is changed in place."""
    if isinstance(array, np.ndarray):
        return np.clip(np.rint(array, out=array), -largest, largest, out=array)
    return jnp.clip(jnp.rint(array), -largest, largest)
