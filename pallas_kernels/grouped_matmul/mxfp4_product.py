"""MXFP4 weights inside a Pallas kernel: their decoding, and few rows times them in block-diagonal form.

Few rows: a code with its exponent and mantissa moved to those of float8_e5m2 is that number times 2^-14, zero and 0.5
too (which is subnormal there), and the matrix units of all TPUs from v5e on take float8_e5m2 weights beside bf16 rows.
So a byte is decoded in eight operations on words of four, two numbers at a time, and no weight is scaled: the rows
stand four times below each other for each 128 inputs, as in `int4_block_diagonal`, and the partial sums are scaled.
A chip that converts float4_e2m1fn by itself (tpu7x) makes float8_e4m3fn of it, which is exact, in half the operations.

More rows: a weight is decoded in float32, scaled, and is a bf16 number then.

Bytes hold an even input and the odd one after it, so that inputs decoded by words come in another order: 32 even ones
of each 64, then the odd ones. `order_inputs` puts those of x in the same.
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

CHUNK = 64  # inputs whose bytes fill a register
COLUMNS = 512  # outputs that few rows are multiplied by at a time: the partial sums of more spill
_HALF = GROUP_SIZE // CODES_PER_BYTE
# In each byte of a word: a code, shifted by one; a number that carries from bit 4 to 7; float8_e5m2's bits of a code.
_CODES, _CARRY, _SIGNS_AND_MAGNITUDES = 0x1E1E1E1E, 0x70707070, 0x8E8E8E8E - 2**32
_RAISE = 2.0**14  # takes back float8_e5m2's 2^-14


def order_inputs(x: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """Puts the even inputs of each 64 before the odd ones, where the chip's weights are decoded by words."""
    if chip().fp4:
        return x
    tokens, K = x.shape
    return x.reshape(tokens, K // CHUNK, CHUNK // 2, 2).swapaxes(2, 3).reshape(tokens, K)


def scale_numbers(N: int, K: int) -> Any:
    """Returns scratch for a step's scales in float32, [N//128, K//32, 128]: rows as wide as a register are broadcast
    without arithmetic when they are loaded."""
    return pltpu.VMEM((N // LANES, K // GROUP_SIZE, LANES), jnp.float32)


def read_scales(scales: UInt8[Array, "K32 N"], numbers_ref: Any) -> None:
    """Writes 2^(byte - 127) to scratch; for a byte of 0 that is 0, since the chip has no such number."""
    numbers = pltpu.bitcast(scales.astype(jnp.int32) << 23, jnp.float32)
    for i in range(numbers_ref.shape[0]):
        numbers_ref[i] = numbers[:, i * LANES : (i + 1) * LANES]


def expand_rows(x: Float[Array, "rows K"]) -> list[Float[Array, "copies*rows 128"]]:
    """Makes the left operands, one for each 128 inputs, from rows of bf16 values in the order of `order_inputs`."""
    native = chip().fp4
    place = lax.broadcasted_iota(jnp.int32, (x.shape[0], INPUTS), 1)
    group = place // GROUP_SIZE if native else place // CHUNK * 2 + place % (CHUNK // 2) // _HALF
    left = []
    for first in range(0, x.shape[1], INPUTS):
        rows = x[:, first : first + INPUTS] * (1 if native else _RAISE)
        diagonal = jnp.concatenate([jnp.where(group == copy, rows, 0) for copy in range(COPIES)])
        left.append(diagonal.astype(jnp.bfloat16))
    return left


def multiply_codes(
    left: list[Float[Array, "copies*rows 128"]], codes: UInt8[Array, "K2 N"], numbers_ref: Any, groups: Any
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
    """Returns code * scale in `dtype`, inputs in the order of `order_inputs`."""
    parts, native = [], chip().fp4
    for i in range(codes.shape[0] * CODES_PER_BYTE // CHUNK):
        chunk = codes[i * CHUNK // 2 : (i + 1) * CHUNK // 2]
        scales = [groups.start + 2 * i, groups.start + 2 * i + 1]
        if native:
            factors = jnp.concatenate([_spread(numbers_ref, scale, GROUP_SIZE) for scale in scales])
            parts.append(pltpu.bitcast(chunk, jnp.float4_e2m1fn).astype(jnp.float32) * factors)
        else:
            factors = jnp.concatenate([_spread(numbers_ref, scale, _HALF) for scale in scales])
            both = chunk.astype(jnp.int32)
            parts += [_to_float32(both & 15) * factors, _to_float32(both >> 4) * factors]
    return jnp.concatenate(parts).astype(jnp.bfloat16).astype(dtype)


def _spread(numbers_ref: Any, group: Any, rows: int, columns: slice | None = None) -> Float[Array, "rows N"]:
    """Returns a group's scales, of all outputs or some, in each of `rows` rows."""
    start, stop = (0, numbers_ref.shape[0] * LANES) if columns is None else (columns.start, columns.stop)
    registers = range(start // LANES, stop // LANES)
    row = pl.ds(group, 1)
    return jnp.concatenate([jnp.broadcast_to(numbers_ref[i, row], (rows, LANES)) for i in registers], axis=1)


def _to_float8(codes: UInt8[Array, "K2 N"]) -> Float[Array, "K N"]:
    """Returns codes in float8_e4m3fn, or times 2^-14 in float8_e5m2, inputs in the order of `order_inputs`."""
    if chip().fp4:
        return pltpu.bitcast(codes, jnp.float4_e2m1fn).astype(jnp.float8_e4m3fn)
    words = pltpu.bitcast(codes, jnp.int32)
    # A carry takes a code's sign from bit 4 to bit 7: in four operations, one fewer than to mask it by itself.
    even, odd = (((half & _CODES) + _CARRY) & _SIGNS_AND_MAGNITUDES for half in (words << 1, words >> 3))
    rows = CHUNK // 8  # words that hold a chunk
    return jnp.concatenate(
        [
            pltpu.bitcast(half[first : first + rows], jnp.float8_e5m2)
            for first in range(0, words.shape[0], rows)
            for half in (even, odd)
        ]
    )


def _to_float32(codes: Array) -> Array:
    """Returns the numbers of codes in int32, as `formats.mxfp4` computes them."""
    normal = pltpu.bitcast(((codes & 7) << 22) + (126 << 23), jnp.float32)
    magnitudes = pltpu.bitcast(jnp.minimum(normal, 2 * normal - 1), jnp.int32)
    return pltpu.bitcast(magnitudes | (codes & 8) << 28, jnp.float32)
