"""Decayed products of keys and queries within a chunk, exact for any gate, all on the matrix unit.

For i > j the decay from j to i is exp(g_{j+1} + ... + g_i). As in `decays`, blocks are cut in halves: for i in the
second half of a block of 2 s tokens and j in its first, it is exp(sum from the cut to i) exp(sum from j to the cut),
two factors of at most 1. One product of all rows and columns, scaled by these, holds every block's corner; a matrix of
codes says from which product an entry is taken. The sums of at most 8 tokens are a product with constant zeros and
ones, the log decays split in bf16 parts, so that only its own terms enter a sum; longer decays are products of shorter
ones. So nothing overflows and nothing cancels.

Where the gate is bounded, factors relative to the middle of a block may exceed 1 and yet be finite: blocks of `base`
tokens need no cut then. Their product's entries above the diagonal mean nothing and are not selected.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.hardware import SUBLANES
from pallas_kernels.kda.mosaic_blocks import (
    CHUNK,
    block_diagonal,
    dot,
    dot_transposed,
    second_halves,
    split_bf16,
    split_heads,
)

# The most that a base block may decay from end to end, in powers of two; half of it on either side of the middle.
_WIDEST = 120


def base_block(lower_bound: float | None) -> int:
    """Returns the tokens of blocks that need no cut: 16 at the usual lower bound of -5, 1 without a bound."""
    base = 1
    while lower_bound is not None and base < CHUNK and 2 * base * -lower_bound <= _WIDEST * math.log(2):
        base *= 2
    return base


def levels(base: int) -> list[int]:
    """Lists the tokens of the halves of each cut."""
    return [size for size in (1, 2, 4, 8, 16, 32) if size >= base]


def sum_weights(base: int) -> np.ndarray:
    """Returns weights [sets * 64, 64] of each token's log decay in each sum.

    The sets are: the sum from the middle of a base block and its negative (if base > 1); for each level below 8 the sum
    from or to the cut; in blocks of max(base, 8) tokens, the sum up to a row's token and the sum after it.
    """
    i, t = np.indices((CHUNK, CHUNK))
    sets = []
    if base > 1:
        middle = i // base * base + base // 2
        from_middle = 1 * ((middle < t) & (t <= i)) - 1 * ((i < t) & (t <= middle))
        sets += [from_middle, -from_middle]
    sets += [level_weights(size) for size in levels(base) if size < SUBLANES]
    together = i // max(base, SUBLANES) == t // max(base, SUBLANES)
    return np.concatenate([*sets, together & (t <= i), together & (t > i)]).astype(np.float32)


def level_weights(size: int) -> np.ndarray:
    """Returns [64, 64], one where a column's log decay is in a row's sum from or to the cut of blocks of 2 * size."""
    i, t = np.indices((CHUNK, CHUNK))
    cut = i // (2 * size) * (2 * size) + size
    return np.where(i >= cut, (cut <= t) & (t <= i), (i < t) & (t < cut))


def level_codes(base: int, pack: int) -> np.ndarray:
    """Returns int32 [64, pack * 64], the level whose product has entry (i, j).

    The code is 1 below the diagonal in base blocks, 0 on the diagonal, and 64 above it.
    """
    i, j = np.indices((CHUNK, CHUNK))
    code = np.where(i > j, 1, np.where(i == j, 0, CHUNK))
    for size in levels(base):
        code[(i // (2 * size) == j // (2 * size)) & (i // size > j // size)] = size
    return np.tile(code, (1, pack)).astype(np.int32)


def num_factors(base: int) -> int:
    """Returns the number of sets of 64 rows that `decay_factors` returns."""
    return len(levels(base)) + (2 if base == 1 else 4)


def decay_sums(g: Float[Array, "64 PD"], weights: Float[Array, "sums parts64"]) -> Float[Array, "sums PD"]:
    """Returns the sums of log decays that `sum_weights` lists, in powers of two; g is split in as many bf16 parts as
    the weights repeat."""
    parts = split_bf16(g * (1 / math.log(2)), weights.shape[1] // CHUNK)
    return dot(weights, jnp.concatenate(parts, axis=0))


def decay_factors(sums: Float[Array, "sums PD"], base: int) -> Float[Array, "factors PD"]:
    """Returns decay factors in sets of 64 rows, of the sums that `decay_sums` returns.

    The sets are: for base blocks of more than a token, the factors of rows and the factors of columns; for each level,
    the factors of rows (in second halves) and of columns (in first halves); the decay up to each row; the decay after
    it.
    """
    factors = jnp.exp2(sums)
    since, until = factors[-2 * CHUNK : -CHUNK], factors[-CHUNK:]
    sets = [factors[: -2 * CHUNK]] if factors.shape[0] > 2 * CHUNK else []
    for size in levels(max(base, SUBLANES)):
        joined, sinces, untils = [], [], []
        for first in range(0, CHUNK, 2 * size):
            cut, end = first + size, first + 2 * size
            joined += [until[first:cut], since[cut:end]]
            sinces += [since[first:cut], since[cut:end] * since[cut - 1 : cut]]
            untils += [until[first:cut] * since[end - 1 : end], until[cut:end]]
        sets.append(jnp.concatenate(joined, axis=0))
        since, until = jnp.concatenate(sinces, axis=0), jnp.concatenate(untils, axis=0)
    return jnp.concatenate([*sets, since, until], axis=0)


def num_products(base: int) -> int:
    """Returns the number of rows that `products` returns."""
    return sum(2 * _rows(size) for size in levels(base)) + (CHUNK if base == 1 else 2 * CHUNK)


def products(
    k: Float[Array, "64 PD"], q: Float[Array, "64 PD"], factors: Float[Array, "factors PD"], base: int, pack: int, dtype
) -> Float[Array, "products P64"]:
    """Returns, for base blocks and then for each level, the rows of k k^T and the rows of q k^T.

    (Base blocks of one token have no rows of k k^T; from level 8 on only rows in second halves are computed.) Operands
    are rounded to `dtype`.
    """
    sets = iter([factors[at : at + CHUNK] for at in range(0, factors.shape[0], CHUNK)])

    def product(rows: list[Array], columns: Array) -> Array:
        right = block_diagonal(split_heads(columns.astype(dtype), pack))
        return dot_transposed(jnp.concatenate(rows, axis=0).astype(dtype), right)

    if base == 1:
        out = [product([q], k)]
    else:
        factor = next(sets)
        out = [product([k * factor, q * factor], k * next(sets))]
    for size in levels(base):
        factor = next(sets)
        keys = k * factor
        if size < SUBLANES:
            out.append(product([keys, q * factor], keys))
        else:
            queries = second_halves(q, size) * second_halves(factor, size)
            out.append(product([second_halves(keys, size), queries], keys))
    return jnp.concatenate(out, axis=0)


def select(
    products: Float[Array, "products P64"], codes: Int32[Array, "64 P64"], base: int
) -> tuple[Float[Array, "64 P64"], Float[Array, "64 P64"]]:
    """Selects decayed k k^T below the diagonal and q k^T up to the diagonal, with zeros elsewhere."""
    keys, queries = [], []
    for row in range(0, CHUNK, SUBLANES):
        code = codes[row : row + SUBLANES]
        at = 0 if base == 1 else CHUNK
        key = jnp.zeros(code.shape, jnp.float32)
        if base > 1:
            key = jnp.where(code == 1, products[row : row + SUBLANES], 0)
        query = jnp.where(code < base, products[at + row : at + row + SUBLANES], 0)
        at += CHUNK
        for size in levels(base):
            if size < SUBLANES or row % (2 * size) >= size:
                place = at + (row if size < SUBLANES else row // (2 * size) * size + row % size)
                key = jnp.where(code == size, products[place : place + SUBLANES], key)
                place += _rows(size)
                query = jnp.where(code == size, products[place : place + SUBLANES], query)
            at += 2 * _rows(size)
        keys.append(key)
        queries.append(query)
    return jnp.concatenate(keys, axis=0), jnp.concatenate(queries, axis=0)


def _rows(size: int) -> int:
    return CHUNK if size < SUBLANES else CHUNK // 2
