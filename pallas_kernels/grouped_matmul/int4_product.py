"""The product, inside a Pallas kernel, of a group's rows with a step's INT4 or MXFP4 weights, a part at a time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.formats.int4_codec import GROUP_SIZE
from pallas_kernels.grouped_matmul import float8_block_diagonal, mxfp4_product
from pallas_kernels.grouped_matmul import int4_block_diagonal as block_diagonal
from pallas_kernels.hardware import LANES, ChipFacts

FEW_ROWS = 8


class Tiles(NamedTuple):
    """Rows of a block, rows multiplied at once, outputs of a step, and inputs unpacked at once.

    `K_part` inputs are unpacked at once for one window of rows, `K_shared` for several.
    """

    block: int
    rows: int
    N: int
    K_part: int
    K_shared: int


class GroupRows(NamedTuple):
    """A group's rows, which `take(first, count, inputs)` returns: they are in windows [low, high).

    If they are `few`, they are also among the `FEW_ROWS` rows from `first_few` on.
    """

    take: Callable[[Any, int, Any], Array]
    low: Array | int
    high: Array
    first_few: Array | int
    few: Array


class Code(NamedTuple):
    """The code of a format: how many inputs a row of its codes has, how many weights are a part for few rows (None:
    `mosaic_int4.PART_WEIGHTS`), whether one window has parts as large, and what is done with a part of a matrix.

    `expand_rows(rows)` and `multiply_codes(left, codes, scales, groups, scratch)` multiply few rows in block-diagonal
    form; `dequantise(codes, scales, groups, scratch, dtype, bf16)` returns the weights [inputs, N].
    """

    inputs_per_row: int
    part_weights: int | None
    large_window: bool
    expand_rows: Callable[[Array], Any]
    multiply_codes: Callable[[Any, Array, Any, Any, Any], Array]
    dequantise: Callable[..., Array]


class MatrixOperand(NamedTuple):
    """A matrix of the group: codes [K, N], or [K//2, N] where two share a byte, and scales [K//32, N].

    `total` is the float32 sum [rows, N] that products are added to, `scale_rows` is scratch of the shape that the
    function `scale_rows` returns.
    """

    codes: Any
    scales: Any
    total: Any
    scale_rows: Any


def scale_rows(tile: Tiles, bf16: bool) -> Any:
    """Returns scratch for a part's scales, in rows as wide as a register."""
    shape = (tile.N // LANES, tile.K_part // GROUP_SIZE, LANES)
    return pltpu.VMEM(shape, jnp.uint32 if bf16 else jnp.float32)


def add_products(
    rows: GroupRows,
    operands: Sequence[MatrixOperand],
    scaled_ref: Any,
    tile: Tiles,
    code: Code,
    *,
    few: bool,
    more: bool,
    dtype: Any,
    bf16: bool,
) -> None:
    """Adds rows times the matrix to `total`, for each operand.

    `scaled_ref` [K_shared, N] is scratch for several windows; None unpacks the weights anew for each. `few` and `more`
    say whether there is code for few rows (block-diagonal) and for more; `bf16` says whether the chip multiplies bf16.
    """

    def multiply(window: Array | int, inputs: Any, matrix: Array, total: Any) -> None:
        first = pl.multiple_of(jnp.asarray(window) * tile.rows, tile.rows)
        left = rows.take(first, tile.rows, inputs).astype(dtype)
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
        total[pl.ds(first, tile.rows), :] += jnp.dot(
            left, matrix, precision=precision, preferred_element_type=jnp.float32
        )

    def for_parts(wanted: Array, size: int, use: Callable[[Any, Any], None]) -> None:
        """Calls `use` with a part at a time, in a loop: unlike a branch's, its turns can be counted, even if it is
        one."""
        groups = size // GROUP_SIZE

        def part(k: Array, _: None) -> None:
            use(pl.ds(pl.multiple_of(k * size, size), size), pl.ds(pl.multiple_of(k * groups, groups), groups))

        inputs = operands[0].codes.shape[0] * code.inputs_per_row
        lax.fori_loop(0, jnp.where(wanted, inputs // size, 0), part, None)

    def read_codes(codes: Any, inputs: Any) -> Array:
        each = code.inputs_per_row
        size = inputs.size // each
        return codes[inputs if each == 1 else pl.ds(pl.multiple_of(inputs.start // each, size), size), :]

    def few_rows(inputs: Any, of_groups: Any) -> None:
        left = code.expand_rows(rows.take(rows.first_few, FEW_ROWS, inputs))
        here = pl.ds(rows.first_few, FEW_ROWS)
        for codes, scales, total, scratch in operands:
            total[here, :] += code.multiply_codes(left, read_codes(codes, inputs), scales, of_groups, scratch)

    def one_window(inputs: Any, of_groups: Any, window: Any = rows.low) -> None:
        for codes, scales, total, scratch in operands:
            matrix = code.dequantise(read_codes(codes, inputs), scales, of_groups, scratch, dtype, bf16)
            multiply(window, inputs, matrix, total)

    def windows(inputs: Any, of_groups: Any) -> None:
        for codes, scales, total, scratch in operands:
            scaled_ref[...] = code.dequantise(read_codes(codes, inputs), scales, of_groups, scratch, dtype, bf16)
            lax.fori_loop(
                rows.low, rows.high, lambda j, _, total=total: multiply(j, inputs, scaled_ref[...], total), None
            )

    count = rows.high - rows.low
    is_few = rows.few & few
    one_part = tile.K_part if code.large_window else tile.K_shared
    if few:
        for_parts(is_few, tile.K_part, few_rows)
    if more and scaled_ref is None:
        each = partial(for_parts, count > 0, one_part)
        high = jnp.where(is_few, rows.low, rows.high)
        lax.fori_loop(rows.low, high, lambda j, _: each(partial(one_window, window=j)), None)
    elif more:
        for_parts(~is_few & (count == 1), one_part, one_window)
        for_parts(~is_few & (count > 1), tile.K_shared, windows)


def _dequantise(codes: Array, scales: Array, rows_ref: Any, dtype: Any, bf16: bool) -> Array:
    """Returns bf16(code * scale) in `dtype`, [K part, N tile]."""
    K, N = codes.shape
    groups = K // GROUP_SIZE
    wide = scales.astype(jnp.float32)
    if bf16:  # twice in a word
        bits = pltpu.bitcast(wide, jnp.uint32)
        wide = bits | bits >> 16
    # A row is broadcast to all sublanes without arithmetic when it is loaded, from rows as wide as a register.
    _write_rows(wide, rows_ref)
    columns = range(N // LANES)
    spread = [
        jnp.concatenate([jnp.broadcast_to(rows_ref[i, pl.ds(g, 1)], (8, LANES)) for i in columns], axis=1)
        for g in range(groups)
    ]
    factors = jnp.concatenate(spread)
    if bf16:
        factors = pltpu.bitcast(factors, jnp.bfloat16)
    per_group = factors.shape[0] // groups
    grouped = codes.astype(factors.dtype).reshape(groups, GROUP_SIZE // per_group, per_group, N)
    product = grouped * factors.reshape(groups, 1, per_group, N)
    return product.reshape(K, N).astype(jnp.bfloat16).astype(dtype)


def _write_rows(scales: Array, rows_ref: Any) -> None:
    for i in range(scales.shape[1] // LANES):
        rows_ref[i, : scales.shape[0]] = scales[:, i * LANES : (i + 1) * LANES]


def _multiply_int4(left: Any, codes: Array, scales: Any, groups: Any, rows_ref: Any) -> Array:
    return block_diagonal.multiply_codes(left, codes, scales[groups, :])


def _multiply_int4_as_float8(left: Any, codes: Array, scales: Any, groups: Any, rows_ref: Any) -> Array:
    """Multiplies on a chip that converts int4 to float8_e4m3fn, which holds -8 to 7."""
    _write_rows(pltpu.bitcast(scales[groups, :].astype(jnp.float32), rows_ref.dtype), rows_ref)

    def numbers(i: int, columns: slice) -> Array:
        inputs = slice(i * block_diagonal.INPUTS, (i + 1) * block_diagonal.INPUTS)
        return codes[inputs, columns].astype(jnp.float8_e4m3fn)

    return float8_block_diagonal.multiply_codes(left, numbers, codes.shape[1], rows_ref, lambda i: i)


def _multiply_mxfp4(left: Any, codes: Array, scales: Any, groups: Any, rows_ref: Any) -> Array:
    return mxfp4_product.multiply_codes(left, codes, scales, groups)


def _dequantise_int4(codes: Array, scales: Any, groups: Any, rows_ref: Any, dtype: Any, bf16: bool) -> Array:
    return _dequantise(codes, scales[groups, :], rows_ref, dtype, bf16)


def _dequantise_mxfp4(codes: Array, scales: Any, groups: Any, rows_ref: Any, dtype: Any, bf16: bool) -> Array:
    return mxfp4_product.dequantise(codes, scales, groups, dtype)


INT4 = Code(1, None, True, block_diagonal.expand_rows, _multiply_int4, _dequantise_int4)
INT4_AS_FLOAT8 = Code(1, 2**23, True, float8_block_diagonal.expand_rows, _multiply_int4_as_float8, _dequantise_int4)
MXFP4 = Code(2, 2**23, False, mxfp4_product.expand_rows, _multiply_mxfp4, _dequantise_mxfp4)


def int4_code(chip: ChipFacts) -> Code:
    """Returns the chip's code of INT4."""
    return INT4_AS_FLOAT8 if chip.fp4 else INT4
