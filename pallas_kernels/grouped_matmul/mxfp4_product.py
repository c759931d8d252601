"""MXFP4 weights inside a Pallas kernel: their decoding, and few rows times them in block-diagonal form.

A code with its exponent and mantissa moved to those of float8_e5m2 is that number times 2^-14, zero and 0.5 too (which
is subnormal there). Taken for an int4 and converted to int8, a code has its sign in the byte's highest bit, and needs
to be moved by one: six operations on words of four bytes make eight numbers. A chip that converts float4_e2m1fn by
itself (tpu7x) makes float8_e4m3fn of it, which is exact, in four.

Few rows: the matrix units of all TPUs from v5e on take float8_e5m2 weights beside bf16 rows, so that no weight is
scaled: the rows stand four times below each other for each 128 inputs, as in `int4_block_diagonal`, and the partial
sums are scaled.

More rows: a weight is scaled in float32, and is a bf16 number then.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.mxfp4 import CODES_PER_BYTE, GROUP_SIZE
from pallas_kernels.grouped_matmul.int4_block_diagonal import COPIES, INPUTS
from pallas_kernels.hardware import LANES, chip

COLUMNS = 512  # outputs that few rows are multiplied by at a time: the partial sums of more spill
# In each byte of a word: float8_e5m2's bits of a code.
_SIGNS_AND_MAGNITUDES = 0x8E8E8E8E - 2**32
_RAISE = 2.0**14  # takes back float8_e5m2's 2^-14


def scale_numbers(N: int, K: int) -> Any:
    """Returns scratch for a step's scales in float32, [N//128, K//32, 128]: rows as wide as a register are broadcast
    without arithmetic when they are loaded."""
    return pltpu.VMEM((N // LANES, K // GROUP_SIZE, LANES), jnp.float32)


def read_scales(scales: UInt8[Array, "K32 N"], numbers_ref: Any) -> None:
    """Writes 2^(byte - 127) to scratch; for a byte of 0 that is 0, since the chip has no such number."""
    numbers = pltpu.bitcast(scales.astype(jnp.int32) << 23, jnp.float32)
    for i in range(numbers_ref.shape[0]):
        numbers_ref[i] = numbers[:, i * LANES : (i + 1) * LANES]


def expand_rows(x: Float[Array, "rows K"]) -> list[Float[Array, "expanded 128"]]:
    """Makes the left operands, one for each 128 inputs, from rows of bf16 values."""
    group = lax.broadcasted_iota(jnp.int32, (x.shape[0], INPUTS), 1) // GROUP_SIZE
    left = []
    for first in range(0, x.shape[1], INPUTS):
        rows = x[:, first : first + INPUTS] * (1 if chip().fp4 else _RAISE)
        diagonal = jnp.concatenate([jnp.where(group == copy, rows, 0) for copy in range(COPIES)])
        left.append(diagonal.astype(jnp.bfloat16))
    return left


def multiply_codes(
    left: list[Float[Array, "expanded 128"]], codes: UInt8[Array, "K2 N"], numbers_ref: Any, groups: Any
) -> Float[Array, "rows N"]:
    """Multiplies the x that `left` was made from by code * scale; the scales are those of `groups` in scratch."""
    rows, N = left[0].shape[0] // COPIES, codes.shape[1]
    totals = []
    for first in range(0, N, COLUMNS):
        columns = slice(first, min(first + COLUMNS, N))
        total = jnp.zeros((rows, columns.stop - first), jnp.float32)
        for i, diagonal in enumerate(left):
            inputs = slice(i * INPUTS // CODES_PER_BYTE, (i + 1) * INPUTS // CODES_PER_BYTE)
            matrix = _to_float8(codes[inputs, columns])
            partial = lax.dot_general(diagonal, matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            for copy in range(COPIES):
                scale = _spread(numbers_ref, groups.start + i * COPIES + copy, rows, columns)
                total += partial[copy * rows : (copy + 1) * rows] * scale
        totals.append(total)
    return jnp.concatenate(totals, axis=1)


def dequantise(codes: UInt8[Array, "K2 N"], numbers_ref: Any, groups: Any, dtype: Any) -> Float[Array, "K N"]:
    """Returns code * scale in `dtype`."""
    wide = jnp.bfloat16 if chip().bf16_vpu else jnp.float32
    numbers = _to_float8(codes).astype(wide)
    numbers = numbers if chip().fp4 else numbers * jnp.asarray(_RAISE, wide)
    spread = [_spread(numbers_ref, groups.start + i, GROUP_SIZE) for i in range(numbers.shape[0] // GROUP_SIZE)]
    return (numbers * jnp.concatenate(spread).astype(wide)).astype(jnp.bfloat16).astype(dtype)


def _spread(numbers_ref: Any, group: Any, rows: int, columns: slice | None = None) -> Float[Array, "rows N"]:
    """Returns a group's scales, of all outputs or some, in each of `rows` rows."""
    start, stop = (0, numbers_ref.shape[0] * LANES) if columns is None else (columns.start, columns.stop)
    registers = range(start // LANES, stop // LANES)
    row = pl.ds(group, 1)
    return jnp.concatenate([jnp.broadcast_to(numbers_ref[i, row], (rows, LANES)) for i in registers], axis=1)


def _to_float8(codes: UInt8[Array, "K2 N"]) -> Float[Array, "K N"]:
    """Returns codes in float8_e4m3fn, or times 2^-14 in float8_e5m2."""
    if chip().fp4:
        return pltpu.bitcast(codes, jnp.float4_e2m1fn).astype(jnp.float8_e4m3fn)
    words = pltpu.bitcast(pltpu.bitcast(codes, jnp.int4).astype(jnp.int8), jnp.int32)
    return pltpu.bitcast((words << 1) & _SIGNS_AND_MAGNITUDES, jnp.float8_e5m2)
