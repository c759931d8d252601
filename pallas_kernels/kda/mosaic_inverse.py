"""(I + A)^-1 of packs of heads for strictly lower triangular A [64, 64], to float32.

Blocks of 16 are inverted by substitution in float32 arithmetic, all blocks of a pack at once. Pairs of blocks are then
merged, T <- T - T F T with F the part of A between the two, in products of three bf16 passes. Blocks of a size are held
side by side, [size, pack * 64]: a product of all of them with a block diagonal then has no more rows than a block.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.hardware import SUBLANES
from pallas_kernels.kda.mosaic_blocks import CHUNK, dot, split_bf16

_BLOCK = 16
# Steps of an inverse after its beginning: two products for each merge, 16 to 32 and 32 to 64.
STEPS = 4


def invert(A: Any, T: Any) -> None:
    """Writes the inverses of I + A into T; both are refs [packs, 64, pack * 64].

    Each step is taken for all packs before the next step, since packs do not wait for one another.
    """
    inverses = [begin_inverse(A, T, p) for p in range(A.shape[0])]
    for _ in range(STEPS):
        for inverse in inverses:
            next(inverse, None)


def begin_inverse(A: Any, T: Any, p: int) -> Iterator[None]:
    """Begins the inverse of pack p, up to its first product; each of its `STEPS` ends with the next product, the last
    with the inverse in T."""
    inverse = _inverse(A, T, p)
    next(inverse)
    return inverse


def _inverse(A: Any, T: Any, p: int) -> Iterator[None]:
    blocks = _invert_blocks(_side_by_side(A[p], _BLOCK, range(CHUNK // _BLOCK)))
    while (size := blocks.shape[0]) < CHUNK:
        # F has the rows of a pair's second block and the lanes of its first, and so has F T.
        F = _side_by_side(A[p], size, range(1, CHUNK // size, 2), shift=1)
        right = _dot_in_three(F, blocks)
        yield
        corners = _dot_in_three(blocks, right, shift=1)
        yield
        second = _block(blocks.shape) % 2 == 1
        blocks = jnp.concatenate([jnp.where(second, 0, blocks), jnp.where(second, blocks, -corners)], axis=0)
    T[p] = blocks


def _block(shape: tuple[int, ...]) -> Int32[Array, "size n"]:
    """Returns the block that each lane is in."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) // shape[0]


def _side_by_side(A: Float[Array, "64 n"], size: int, rows: range, shift: int = 0) -> Float[Array, "size n"]:
    """Returns the blocks of A in these rows of blocks, each `shift` blocks left of the diagonal; zeros elsewhere."""
    shape = (size, A.shape[1])
    place = _block(shape) % (CHUNK // size)
    out = jnp.zeros(shape, A.dtype)
    for row in rows:
        out = jnp.where(place == row - shift, A[row * size : (row + 1) * size], out)
    return out


def _dot_in_three(a: Float[Array, "size n"], b: Float[Array, "size n"], shift: int = 0) -> Float[Array, "size n"]:
    """Multiplies blocks that are side by side in three bf16 passes, exact to about 2^-17: hi hi + hi lo + lo hi.

    Block j of the result is block j + shift of a times block j of b. (With a shift, only the first blocks of pairs in b
    are taken.)
    """
    size, lanes = b.shape
    block = _block(b.shape)

    def diagonal(part: Array) -> Array:
        zeros = jnp.zeros_like(part)
        return jnp.concatenate(
            [
                zeros if shift and row % 2 == 0 else jnp.where(block == row - shift, part, zeros)
                for row in range(lanes // size)
            ],
            axis=0,
        )

    right = jnp.concatenate([diagonal(part) for part in split_bf16(b, 2)], axis=1)
    products = dot(jnp.concatenate(split_bf16(a, 2), axis=0), right)
    return products[:size, :lanes] + (products[:size, lanes:] + products[size:, :lanes])


def _invert_blocks(A: Float[Array, "16 n"]) -> Float[Array, "16 n"]:
    """Inverts I + A of blocks that are side by side, by substitution."""
    shape = (SUBLANES, A.shape[1])
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    starts = range(0, _BLOCK, SUBLANES)
    T = [jnp.where(lane % _BLOCK == row + at, 1.0, 0.0) for at in starts]
    for j in range(_BLOCK - 1):
        solved = T[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        for part, at in enumerate(starts):
            if j < at + SUBLANES - 1:  # a row further down
                column = jnp.take_along_axis(
                    A[at : at + SUBLANES], lane // _BLOCK * _BLOCK + j, axis=1, mode="promise_in_bounds"
                )
                T[part] = T[part] - column * solved
    return jnp.concatenate(T, axis=0)
