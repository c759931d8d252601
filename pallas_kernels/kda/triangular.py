"""The inverse of I + L for strictly lower triangular L: blocks of 8 by the finite Neumann product, then pairs merged.

A Neumann product over a whole chunk passes through powers of L that are astronomically large when keys are alike, and
cancels; over 8 rows they stay below binomial(7, 3) = 35. Merging is exact block substitution:
inv([[A, 0], [F, B]]) = [[A', 0], [-B' F A', B']], A' and B' the inverses of A and B.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_BLOCK = 8


def unit_lower_inverse(L: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Returns (I + L)^-1; C is 8 times a power of two, and only the part of L below the diagonal is read."""
    inverse = _invert_blocks(_diagonal_blocks(L, _BLOCK))
    while inverse.shape[-1] < L.shape[-1]:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        size = inverse.shape[-1]
        below = _diagonal_blocks(L, 2 * size)[..., size:, :size]
        corner = -_matmul(_matmul(second, below), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]


def _diagonal_blocks(L: Float[Array, "*batch C C"], size: int) -> Float[Array, "*batch blocks size size"]:
    starts = range(0, L.shape[-1], size)
    return jnp.stack([L[..., start : start + size, start : start + size] for start in starts], axis=-3)


def _invert_blocks(L: Float[Array, "*batch 8 8"]) -> Float[Array, "*batch 8 8"]:
    power = jnp.where(np.tri(_BLOCK, k=-1, dtype=bool), L, 0)
    eye = jnp.eye(_BLOCK, dtype=L.dtype)
    inverse = eye - power
    # L^8 = 0, so (I - L)(I + L^2)(I + L^4) is all of the series.
    for _ in range(2):
        power = _matmul(power, power)
        inverse = _matmul(inverse, eye + power)
    return inverse


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
