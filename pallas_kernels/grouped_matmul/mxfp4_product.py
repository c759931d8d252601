"""MXFP4 weights inside a Pallas kernel: their decoding, and few rows times them in block-diagonal form.

Few rows: a code with its exponent and mantissa moved to those of float8_e5m2 is that number times 2^-14, zero and 0.5
too (which is subnormal there), and the matrix units of all TPUs from v5e on take float8_e5m2 weights beside bf16 rows.
So a byte is decoded in eight operations on words of four, two numbers at a time, and no weight is scaled: the rows
stand four times below each other for each 128 inputs, as in `int4_block_diagonal`, and the partial sums are scaled.

More rows: a weight is decoded in float32, scaled, and is a bf16 number then.

Bytes hold an even input and the odd one after it, so that decoded inputs come in another order: 32 even ones of each
64, then the odd ones. `order_inputs` puts those of x in the same.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.mxfp4 import CODES_PER_BYTE, GROUP_SIZE
from pallas_kernels.grouped_matmul.int4_block_diagonal import COPIES, INPUTS

CHUNK = 64  # inputs whose bytes fill a register
COLUMNS = 256  # outputs that few rows are multiplied by at once, as wide as a matrix unit: more spill
_HALF = GROUP_SIZE // CODES_PER_BYTE
# In each byte of a word: a code, shifted by one; a number that carries from bit 4 to 7; float8_e5m2's bits of a code.
_CODES, _CARRY, _SIGNS_AND_MAGNITUDES = 0x1E1E1E1E, 0x70707070, 0x8E8E8E8E - 2**32
_RAISE = 2.0**14  # takes back float8_e5m2's 2^-14


def order_inputs(x: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """Puts the even inputs of each 64 before the odd ones."""
    tokens, K = x.shape
    return x.reshape(tokens, K // CHUNK, CHUNK // 2, 2).swapaxes(2, 3).reshape(tokens, K)


def read_scales(scales: UInt8[Array, "K32 N"]) -> Float[Array, "K32 N"]:
    """Returns 2^(byte - 127) in float32; for a byte of 0 that is 0, since the chip has no such number."""
    return pltpu.bitcast(scales.astype(jnp.int32) << 23, jnp.float32)


def expand_rows(x: Float[Array, "rows K"]) -> list[Float[Array, "copies*rows 128"]]:
    """Makes the left operands, one for each 128 inputs, from rows of bf16 values in the order of `order_inputs`."""
    place = lax.broadcasted_iota(jnp.int32, (x.shape[0], INPUTS), 1)
    group = place // CHUNK * 2 + place % (CHUNK // 2) // _HALF
    left = []
    for first in range(0, x.shape[1], INPUTS):
        rows = x[:, first : first + INPUTS] * _RAISE
        diagonal = jnp.concatenate([jnp.where(group == copy, rows, 0) for copy in range(COPIES)])
        left.append(diagonal.astype(jnp.bfloat16))
    return left


def multiply_codes(
    left: list[Float[Array, "copies*rows 128"]], codes: UInt8[Array, "K2 N"], scales: Float[Array, "K32 N"]
) -> Float[Array, "rows N"]:
    """Multiplies the x that `left` was made from by code * scale."""
    rows, N = left[0].shape[0] // COPIES, codes.shape[1]
    totals = []
    for column in range(0, N, COLUMNS):
        columns = slice(column, min(column + COLUMNS, N))
        total = jnp.zeros((rows, columns.stop - column), jnp.float32)
        for i, diagonal in enumerate(left):
            matrix = _to_e5m2(codes[i * INPUTS // CODES_PER_BYTE : (i + 1) * INPUTS // CODES_PER_BYTE, columns])
            partial = lax.dot_general(diagonal, matrix, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            for copy in range(COPIES):
                scale = scales[i * COPIES + copy : i * COPIES + copy + 1, columns]
                total += partial[copy * rows : (copy + 1) * rows] * scale
        totals.append(total)
    return jnp.concatenate(totals, axis=1)


def dequantise(codes: UInt8[Array, "K2 N"], scales: Float[Array, "K32 N"], dtype: Any) -> Float[Array, "K N"]:
    """Returns code * scale in `dtype`, inputs in the order of `order_inputs`."""
    numbers = codes.astype(jnp.int32)
    parts = []
    for chunk in range(codes.shape[0] * CODES_PER_BYTE // CHUNK):
        both = numbers[chunk * CHUNK // 2 : (chunk + 1) * CHUNK // 2]
        factors = jnp.concatenate(
            [jnp.broadcast_to(scales[2 * chunk + g : 2 * chunk + g + 1], (_HALF, codes.shape[1])) for g in (0, 1)]
        )
        parts += [_to_float32(both & 15) * factors, _to_float32(both >> 4) * factors]
    return jnp.concatenate(parts).astype(jnp.bfloat16).astype(dtype)


def _to_e5m2(codes: UInt8[Array, "K2 N"]) -> Float[Array, "K N"]:
    """Returns code * 2^-14, inputs in the order of `order_inputs`."""
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
