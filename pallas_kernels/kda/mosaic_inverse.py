"""(I + A)^-1 of packs of heads for strictly lower triangular A [64, 64], to float32.

Blocks of 8 are inverted by substitution in float32 arithmetic, all blocks of a pack at once: they fill one register, a
row of each to a sublane. Pairs of blocks are then merged, T <- T - T F T with F the part of A between the two, in
products of three bf16 passes.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.kda.mosaic_blocks import CHUNK, dot_in_three, second_halves

_BLOCK = 8


def invert(A: Any, T: Any, pack: int) -> None:
    """Writes the inverses of I + A into T; both are refs [packs, 64, pack * 64].

    Each step is taken for all packs before the next step, since packs do not wait for one another.
    """
    packs = range(A.shape[0])
    row, lane = (lax.broadcasted_iota(jnp.int32, A.shape[1:], axis) for axis in (0, 1))
    for p in packs:
        T[p] = _invert_blocks(A[p])
    for size in (8, 16, 32):
        between = second_halves(row, size) // size - 1 == second_halves(lane, size) % CHUNK // size
        F = [jnp.where(between, second_halves(A[p], size), 0) for p in packs]
        right = [_below(dot_in_three(F[p], T[p], pack), size) for p in packs]
        corners = [dot_in_three(second_halves(T[p], size), right[p], pack) for p in packs]
        for p in packs:
            for at in range(0, CHUNK // 2, size):
                T[p, 2 * at + size : 2 * at + 2 * size] -= corners[p][at : at + size]


def _below(rows: Float[Array, "32 n"], size: int) -> Float[Array, "64 n"]:
    """Places the rows as second halves of blocks; first halves are zero."""
    zeros = jnp.zeros((size, rows.shape[1]), rows.dtype)
    pieces = [piece for at in range(0, CHUNK // 2, size) for piece in (zeros, rows[at : at + size])]
    return jnp.concatenate(pieces, axis=0)


def _invert_blocks(A: Float[Array, "64 n"]) -> Float[Array, "64 n"]:
    shape = (_BLOCK, A.shape[1])
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    blocks = [lane % CHUNK // _BLOCK == b for b in range(CHUNK // _BLOCK)]
    L = jnp.zeros(shape, jnp.float32)
    for b, block in enumerate(blocks):
        L = jnp.where(block, A[b * _BLOCK : (b + 1) * _BLOCK], L)
    T = jnp.where(lane % _BLOCK == row, 1.0, 0.0)
    for j in range(_BLOCK - 1):
        column = jnp.take_along_axis(L, lane // _BLOCK * _BLOCK + j, axis=1, mode="promise_in_bounds")
        T = T - column * T[j : j + 1]
    return jnp.concatenate([jnp.where(block, T, 0) for block in blocks], axis=0)
