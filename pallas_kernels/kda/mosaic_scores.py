"""Decayed products of keys and queries within a chunk, exact for any gate, all on the matrix unit.

For i > j the decay from j to i is exp(G_i - G_j). As in `decays`, blocks are cut in halves: for i in the second half of
a block of 2 s tokens and j in its first, it is exp(sum from the cut to i) * exp(sum from j to the cut), two factors of
at most 1. One product with all rows and columns so scaled gives every block's corner; a matrix of levels says which
entries of which product are meant. The sums themselves are a product with a constant matrix of zeros and ones, the
decays split in bf16 parts, so that nothing accumulates but what belongs to the sum.

Where the gate is bounded, factors relative to the middle of a block may exceed 1 and yet be finite: blocks of `base`
tokens then need no cut. Their products above the diagonal mean nothing and are not selected.
"""

import numpy as np

from pallas_kernels.kda.mosaic_dots import CHUNK

SUBLANES = 8
LOG2_E = 1.4426950408889634
# Base blocks' decay from end to end, in powers of two: half of it either side of the middle.
_WIDEST = 120


def base_block(lower_bound: float | None) -> int:
    """Tokens of the blocks that need no cut: 16 at the usual lower bound of -5, 1 without one."""
    base = 1
    while lower_bound is not None and base < CHUNK and -lower_bound * LOG2_E * 2 * base <= _WIDEST:
        base *= 2
    return base


def levels(base: int) -> list[int]:
    """Halves' sizes, base to 32."""
    return [size for size in (1, 2, 4, 8, 16, 32) if size >= base]


def sum_weights(base: int) -> np.ndarray:
    """[sets * 64, 64]: what a token's log decay counts in each sum. Sets: one per level below 8; for base blocks of more
    than a token the sum from the block's middle, and its negative; then in blocks of max(base, 8) what lies up to the
    row's token and what follows it."""
    i, t = np.indices((CHUNK, CHUNK))
    sets = []
    for size in levels(base):
        if size < SUBLANES:
            cut = i // (2 * size) * (2 * size) + size
            sets.append(np.where(i >= cut, (cut <= t) & (t <= i), (i < t) & (t < cut)))
    if base > 1:
        middle = i // base * base + base // 2
        from_middle = 1 * ((middle < t) & (t <= i)) - 1 * ((i < t) & (t <= middle))
        sets += [from_middle, -from_middle]
    together = i // max(base, SUBLANES) == t // max(base, SUBLANES)
    return np.concatenate([*sets, together & (t <= i), together & (t > i)]).astype(np.float32)


def level_codes(base: int, pack: int) -> np.ndarray:
    """int32 [64, pack * 64]: the level that gives entry (i, j); 1 below the diagonal of base blocks, 0 on the diagonal,
    64 above it."""
    i, j = np.indices((CHUNK, CHUNK))
    codes = np.where(i > j, 1, np.where(i == j, 0, CHUNK))
    for size in levels(base):
        codes[(i // (2 * size) == j // (2 * size)) & (i // size > j // size)] = size
    return np.tile(codes, (1, pack)).astype(np.int32)
