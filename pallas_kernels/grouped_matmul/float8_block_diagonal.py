"""Few rows of bf16 times codes of four bits in block-diagonal form, where float8 holds every code.

As in `int4_block_diagonal`, the rows stand four times below each other for each 128 inputs, and the partial sums are
scaled instead of the weights. The matrix units of TPUs take float8 weights beside bf16 rows, twice as many at a time as
weights of bf16.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.formats.int4_codec import GROUP_SIZE
from pallas_kernels.grouped_matmul.int4_block_diagonal import COPIES, INPUTS
from pallas_kernels.hardware import LANES

COLUMNS = 512  # outputs that few rows are multiplied by at a time: the partial sums of more spill


def expand_rows(x: Float[Array, "rows K"]) -> list[Float[Array, "expanded 128"]]:
    """Makes the left operands, one for each 128 inputs, from rows of bf16 values."""
    group = lax.broadcasted_iota(jnp.int32, (x.shape[0], INPUTS), 1) // GROUP_SIZE
    left = []
    for first in range(0, x.shape[1], INPUTS):
        rows = x[:, first : first + INPUTS]
        diagonal = jnp.concatenate([jnp.where(group == copy, rows, 0) for copy in range(COPIES)])
        left.append(diagonal.astype(jnp.bfloat16))
    return left


def multiply_codes(
    left: list[Float[Array, "expanded 128"]],
    codes: Callable[[int, slice], Float[Array, "128 columns"]],
    N: int,
    scales_ref: Any,
    scale_row: Callable[[int], Any],
) -> Float[Array, "rows N"]:
    """Multiplies the x that `left` was made from by code * scale.

    `codes(i, columns)` returns the i-th 128 inputs of these outputs in float8; the scales of the i-th 32 inputs are row
    `scale_row(i)` of `scales_ref`, which `spread_scale` reads.
    """
    rows = left[0].shape[0] // COPIES
    totals = []
    for first in range(0, N, COLUMNS):
        columns = slice(first, min(first + COLUMNS, N))
        total = jnp.zeros((rows, columns.stop - first), jnp.float32)
        for i, diagonal in enumerate(left):
            partial = lax.dot_general(
                diagonal, codes(i, columns), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            for copy in range(COPIES):
                scale = spread_scale(scales_ref, scale_row(i * COPIES + copy), rows, columns)
                total += partial[copy * rows : (copy + 1) * rows] * scale
        totals.append(total)
    return jnp.concatenate(totals, axis=1)


def spread_scale(scales_ref: Any, row: Any, rows: int, columns: slice | None = None) -> Float[Array, "rows N"]:
    """Returns a row of scales, of all outputs or some, in each of `rows` rows.

    `scales_ref` [N//128, all rows, 128] has float32 numbers, or their bits: rows as wide as a register are broadcast
    without arithmetic when they are loaded.
    """
    start, stop = (0, scales_ref.shape[0] * LANES) if columns is None else (columns.start, columns.stop)
    one = pl.ds(row, 1)
    spread = [jnp.broadcast_to(scales_ref[i, one], (rows, LANES)) for i in range(start // LANES, stop // LANES)]
    numbers = jnp.concatenate(spread, axis=1)
    return numbers if numbers.dtype == jnp.float32 else pltpu.bitcast(numbers, jnp.float32)
