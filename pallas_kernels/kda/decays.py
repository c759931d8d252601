"""Products of keys (or queries) under per-channel decay, exact for any gate, by binary splitting of a chunk.

A chunk needs A_ij = sum_d a_id b_jd exp(g_{j+1,d} + ... + g_{i,d}) for i >= j. Splitting it, exp(G_i) exp(-G_j)
overflows, and differences of long cumulative sums cancel. Cut the chunk in halves instead: for i in the second half and
j in the first, the exponent is the sum from the cut to i plus the sum from j to the cut, both non-positive, each summed
from its own terms. The halves are cut in turn, down to single tokens, where the exponent is empty. So nothing
overflows, nothing cancels, and every product is a matrix product.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float


class BlockDecays(NamedTuple):
    """Sums of the log decay inside blocks of `size` tokens; [..., blocks, size, D], totals [..., blocks, 1, D]."""

    prefix: Float[Array, "*batch blocks size D"]  # from the block's first token to this one, inclusive
    suffix: Float[Array, "*batch blocks size D"]  # from the next token to the block's last
    total: Float[Array, "*batch blocks 1 D"]


def single_tokens(g: Float[Array, "*batch C D"]) -> BlockDecays:
    """Returns the sums of blocks of one token."""
    g = g[..., None, :]
    return BlockDecays(g, jnp.zeros_like(g), g)


def merge_pairs(decays: BlockDecays) -> BlockDecays:
    """Returns the sums of blocks twice as long."""
    left, right = (BlockDecays(*(array[..., side::2, :, :] for array in decays)) for side in (0, 1))
    return BlockDecays(
        jnp.concatenate([left.prefix, right.prefix + left.total], axis=-2),
        jnp.concatenate([left.suffix + right.total, right.suffix], axis=-2),
        left.total + right.total,
    )


def decayed_products(
    rows: Float[Array, "sides *batch C D"], columns: Float[Array, "*batch C D"], g: Float[Array, "*batch C D"]
) -> tuple[Float[Array, "sides *batch C C"], BlockDecays]:
    """Returns sum_d rows_id columns_jd exp(g_{j+1,d} + ... + g_{i,d}) for i >= j and 0 above the diagonal.

    C is a power of two from 4. Also returns the sums over the whole chunk (one block of C tokens).
    """
    products, decays = _products_in_fours(rows, columns, g)
    while (size := decays.prefix.shape[-2]) < g.shape[-2]:
        second = rearrange(rows, "s ... (p two i) d -> two s ... p i d", two=2, i=size)[1]
        first = rearrange(columns, "... (p two j) d -> two ... p j d", two=2, j=size)[0]
        across = _inner(
            second * jnp.exp(decays.prefix[..., 1::2, :, :]), first * jnp.exp(decays.suffix[..., 0::2, :, :])
        )
        upper = jnp.concatenate([products[..., 0::2, :, :], jnp.zeros_like(across)], axis=-1)
        lower = jnp.concatenate([across, products[..., 1::2, :, :]], axis=-1)
        products = jnp.concatenate([upper, lower], axis=-2)
        decays = merge_pairs(decays)
    return products[..., 0, :, :], decays


def _products_in_fours(
    rows: Float[Array, "sides *batch C D"], columns: Float[Array, "*batch C D"], g: Float[Array, "*batch C D"]
) -> tuple[Float[Array, "sides *batch blocks 4 4"], BlockDecays]:
    """Computes the two lowest levels, each masked out of a 4 by 4 product: smaller matrices do not pay."""
    rows, columns = (rearrange(array, "... (p i) d -> ... p i d", i=4) for array in (rows, columns))
    i, j = np.indices((4, 4))
    products = jnp.where(i == j, _inner(rows, columns), 0)
    decays = single_tokens(g)
    for size in (1, 2):
        prefix, suffix = (rearrange(array, "... (p m) i d -> ... p (m i) d", m=4 // size) for array in decays[:2])
        across = (i // (2 * size) == j // (2 * size)) & (i // size > j // size)
        products = jnp.where(across, _inner(rows * jnp.exp(prefix), columns * jnp.exp(suffix)), products)
        decays = merge_pairs(decays)
    return products, decays


def _inner(
    rows: Float[Array, "sides *batch m D"], columns: Float[Array, "*batch n D"]
) -> Float[Array, "sides *batch m n"]:
    return jnp.einsum("s...id,...jd->s...ij", rows, columns, precision=lax.Precision.HIGHEST)
