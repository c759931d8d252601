"""Few rows of bf16 times INT4 weights, for TPUs without bf16 vector arithmetic (v5), where scaling weights costs most.

For each 128 inputs the rows stand four times below each other, each time with the 32 inputs of one scale and zeros for
the rest. One product with the codes gives four partial sums for each row, which are scaled in float32 and added: work
for the vector unit in proportion to the rows, not to the inputs. (The matrix unit's work grows fourfold: hence few
rows.) A weight is code * scale here, without the rounding to bf16.

Codes become bf16 without arithmetic: a nibble whose sign bit is flipped is code + 8, and as the last bits of the bf16
number 128 it makes that 136 + code. Two nibbles of a word of eight are taken at a time, four apart; the inputs come out
of order that way, so those of the rows are permuted alike, and 136 times their sum is taken off each partial sum.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int4

from pallas_kernels.formats.int4_codec import GROUP_SIZE

# Inputs that one product takes, as many as the matrix unit does, and inputs whose codes fill an 8 x 128 register.
INPUTS, WORD_INPUTS = 128, 64
COPIES = INPUTS // GROUP_SIZE
CODES_PER_WORD = 8
# In both halves of a word the bf16 number 128, and the sign bit of a code to be flipped.
FLIPPED_128, OFFSET = 0x43084308, 128 + 8


class BlockDiagonal(NamedTuple):
    """The block-diagonal rows for each `INPUTS` inputs, and OFFSET times each row's sum."""

    rows: list[Float[Array, "copies*rows 128"]]
    offsets: list[Float[Array, "copies*rows 1"]]


def expand_rows(x: Float[Array, "rows K"]) -> BlockDiagonal:
    """Makes the left operand from rows of bf16 values, given as float32; K is a multiple of 128."""
    position = lax.broadcasted_iota(jnp.int32, (x.shape[0], INPUTS), 1)
    within = position % WORD_INPUTS
    pair = within % 16 // 2
    source = position - within + pair * CODES_PER_WORD + within % 2 * 4 + within // 16
    group = source // GROUP_SIZE
    made = BlockDiagonal([], [])
    for first in range(0, x.shape[1], INPUTS):
        permuted = jnp.take_along_axis(x[:, first : first + INPUTS], source, axis=1)
        diagonal = jnp.concatenate([jnp.where(group == copy, permuted, 0) for copy in range(COPIES)])
        made.rows.append(diagonal.astype(jnp.bfloat16))
        made.offsets.append(OFFSET * jnp.sum(diagonal, axis=1, keepdims=True))
    return made


def multiply_codes(
    left: BlockDiagonal, codes: Int4[Array, "K N"], scales: Float[Array, "K32 N"]
) -> Float[Array, "rows N"]:
    """Multiplies the x that `left` was made from by code * scale."""
    scales = scales.astype(jnp.float32)
    rows = left.rows[0].shape[0] // COPIES
    total = jnp.zeros((rows, codes.shape[1]), jnp.float32)
    for i, (diagonal, offset) in enumerate(zip(*left, strict=True)):
        matrix = _plus_offset(codes[i * INPUTS : (i + 1) * INPUTS])
        partial = jnp.dot(diagonal, matrix, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
        partial -= offset
        for copy in range(COPIES):
            scale = scales[i * COPIES + copy : i * COPIES + copy + 1]
            total += partial[copy * rows : (copy + 1) * rows] * scale
    return total


def _plus_offset(codes: Int4[Array, "K N"]) -> Float[Array, "K N"]:
    """Returns OFFSET + code in bf16, with rows in the order of the columns of `expand_rows`."""
    words = pltpu.bitcast(codes, jnp.int32)
    per_register = WORD_INPUTS // CODES_PER_WORD
    return jnp.concatenate(
        [
            pltpu.bitcast((words[first : first + per_register] >> shift) & 0x000F000F ^ FLIPPED_128, jnp.bfloat16)
            for first in range(0, words.shape[0], per_register)
            for shift in range(0, 16, 4)
        ]
    )
