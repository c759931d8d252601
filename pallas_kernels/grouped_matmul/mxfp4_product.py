"""MXFP4 weights inside a Pallas kernel: their decoding, and few rows times them in block-diagonal form.

A code with its exponent and mantissa moved to those of float8_e5m2 is that number times 2^-14, zero and 0.5 too (which
is subnormal there). Taken for an int4 and converted to int8, a code has its sign in the byte's highest bit, and needs
to be moved by one: six operations on words of four bytes make eight numbers. A chip that converts float4_e2m1fn by
itself (tpu7x) makes float8_e4m3fn of it, which is exact, in four.

Few rows: the matrix units of all TPUs from v5e on take float8_e5m2 weights beside bf16 rows, so that no weight is
scaled, but partial sums are (`float8_block_diagonal`).

More rows: a weight is scaled in float32, and is a bf16 number then.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.mxfp4 import CODES_PER_BYTE, GROUP_SIZE
from pallas_kernels.grouped_matmul import float8_block_diagonal as block_diagonal
from pallas_kernels.grouped_matmul.int4_block_diagonal import INPUTS
from pallas_kernels.hardware import LANES, chip

# In each byte of a word: float8_e5m2's bits of a code.
_SIGNS_AND_MAGNITUDES = 0x8E8E8E8E - 2**32
_RAISE = 2.0**14  # takes back float8_e5m2's 2^-14


def scale_numbers(N: int, K: int) -> Any:
    """Returns scratch for a step's scales in float32, [N//128, K//32, 128]."""
    return pltpu.VMEM((N // LANES, K // GROUP_SIZE, LANES), jnp.float32)


def read_scales(scales: UInt8[Array, "K32 N"], numbers_ref: Any) -> None:
    """Writes 2^(byte - 127) to scratch; for a byte of 0 that is 0, since the chip has no such number."""
    numbers = pltpu.bitcast(scales.astype(jnp.int32) << 23, jnp.float32)
    for i in range(numbers_ref.shape[0]):
        numbers_ref[i] = numbers[:, i * LANES : (i + 1) * LANES]


def expand_rows(x: Float[Array, "rows K"]) -> list[Float[Array, "expanded 128"]]:
    """Makes the left operands, one for each 128 inputs, from rows of bf16 values."""
    return block_diagonal.expand_rows(x if chip().fp4 else x * _RAISE)


def multiply_codes(
    left: list[Float[Array, "expanded 128"]], codes: UInt8[Array, "K2 N"], numbers_ref: Any, groups: Any
) -> Float[Array, "rows N"]:
    """Multiplies the x that `left` was made from by code * scale; the scales are those of `groups` in scratch."""

    def numbers(i: int, columns: slice) -> Float[Array, "128 columns"]:
        return _to_float8(codes[i * INPUTS // CODES_PER_BYTE : (i + 1) * INPUTS // CODES_PER_BYTE, columns])

    return block_diagonal.multiply_codes(left, numbers, codes.shape[1], numbers_ref, lambda i: groups.start + i)


def dequantise(codes: UInt8[Array, "K2 N"], numbers_ref: Any, groups: Any, dtype: Any) -> Float[Array, "K N"]:
    """Returns code * scale in `dtype`."""
    wide = jnp.bfloat16 if chip().bf16_vpu else jnp.float32
    numbers = _to_float8(codes).astype(wide)
    numbers = numbers if chip().fp4 else numbers * jnp.asarray(_RAISE, wide)
    spread = [
        block_diagonal.spread_scale(numbers_ref, groups.start + i, GROUP_SIZE)
        for i in range(numbers.shape[0] // GROUP_SIZE)
    ]
    return (numbers * jnp.concatenate(spread).astype(wide)).astype(jnp.bfloat16).astype(dtype)


def _to_float8(codes: UInt8[Array, "K2 N"]) -> Float[Array, "K N"]:
    """Returns codes in float8_e4m3fn, or times 2^-14 in float8_e5m2."""
    if chip().fp4:
        return pltpu.bitcast(codes, jnp.float4_e2m1fn).astype(jnp.float8_e4m3fn)
    words = pltpu.bitcast(pltpu.bitcast(codes, jnp.int4).astype(jnp.int8), jnp.int32)
    return pltpu.bitcast((words << 1) & _SIGNS_AND_MAGNITUDES, jnp.float8_e5m2)
