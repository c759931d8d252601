"""INT4 weights in groups of 32: published words, the kernels' codes, and conversions between them and real numbers.

Published (compressed-tensors `pack-quantized`, as Moonshot ships it): a Linear's weight [out, in] as int32 words [out,
in/8] with the low nibble first and an offset of 8, and bf16 scales [out, in/32]. Kernel layout: `jnp.int4` codes [in,
out] and scales [in/32, out], so that x [M, in] multiplies from the left. Leading axes (experts, layers) pass through
all of these functions. The quantiser is the symmetric one of Kimi's quantisation-aware training: scale = bf16(amax /
7), codes -7..7.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int, Int4, Int32

from pallas_kernels.checks import check_dtype, checks_arguments

GROUP_SIZE = 32
CODES_PER_WORD = 8


@checks_arguments
def unpack_int4(
    words: Int32[Array, "*batch out words"], scales: Float[Array, "*batch out groups"]
) -> tuple[Int4[Array, "*batch in out"], Float[Array, "*batch groups out"]]:
    """Unpacks published words into the kernels' codes.

    Maps words int32 [..., out, in/8] and scales [..., out, in/32] to codes int4 [..., in, out] and scales [..., in/32,
    out].

    Raises:
      ValueError: words are not int32, or the scales' shape is not the words' with a quarter of the columns.
    """
    check_dtype("unpack_int4", "words", words, jnp.int32)
    *outer, columns = jnp.shape(words)
    _check_scales("unpack_int4", scales, (*outer, columns * CODES_PER_WORD // GROUP_SIZE), columns * CODES_PER_WORD)
    nibbles = (jnp.asarray(words)[..., None] >> (4 * jnp.arange(CODES_PER_WORD, dtype=jnp.int32))) & 0xF
    codes = rearrange(nibbles - 8, "... o w j -> ... (w j) o")
    return codes.astype(jnp.int4), rearrange(jnp.asarray(scales), "... o g -> ... g o")


@checks_arguments
def pack_int4(
    codes: Int4[Array, "*batch in out"], scales: Float[Array, "*batch groups out"]
) -> tuple[Int32[Array, "*batch out words"], Float[Array, "*batch out groups"]]:
    """Packs codes [..., in, out] and scales [..., in/32, out] into words int32 [..., out, in/8] and scales [..., out,
    in/32].

    The inverse of `unpack_int4`.

    Raises:
      ValueError: codes are not int4, or the scales' shape is not the codes' with a thirty-second of the rows.
    """
    check_codes("pack_int4", codes, scales)
    nibbles = rearrange(jnp.asarray(codes).astype(jnp.int32) + 8, "... (w j) o -> ... o w j", j=CODES_PER_WORD)
    shifted = nibbles.astype(jnp.uint32) << (4 * jnp.arange(CODES_PER_WORD, dtype=jnp.uint32))
    words = jnp.sum(shifted, axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32), rearrange(jnp.asarray(scales), "... g o -> ... o g")


@checks_arguments
def quantize_int4(
    weights: Float[Array, "*batch in out"],
) -> tuple[Int4[Array, "*batch in out"], Float[Array, "*batch groups out"]]:
    """Quantises weights [..., in, out] to codes int4 -7..7 [..., in, out] and bf16 scales [..., in/32, out].

    The weights are rounded to bf16 first. Then per group of 32 along `in`: scale = bf16(amax / 7), code =
    round_half_even(w / scale) with the quotient in float32; a group of zeros gets scale 1.
    Dequantised weights are a fixed point: `dequantize_int4` of the result, quantised again, gives the same codes and
    scales. (With other scales this need not hold: for 14 of bf16's 128 significands no bf16 amax has that scale.)

    Raises:
      ValueError: weights are not floating point, or `in` is no multiple of 32.
    """
    check_dtype("quantize_int4", "weights", weights, jnp.floating)
    if jnp.ndim(weights) < 2 or jnp.shape(weights)[-2] % GROUP_SIZE:
        raise ValueError(
            f"quantize_int4: weights have shape {jnp.shape(weights)}, "
            f"expected [..., in, out] with in a multiple of {GROUP_SIZE}"
        )
    rounded = jax.lax.reduce_precision(jnp.asarray(weights).astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    groups = rearrange(rounded, "... (g i) o -> ... g i o", i=GROUP_SIZE)
    largest = jnp.max(jnp.abs(groups), axis=-2)
    scales = _quotient(largest, jnp.full_like(largest, 7)).astype(jnp.bfloat16)
    scales = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    divisors = jnp.broadcast_to(scales[..., None, :].astype(jnp.float32), groups.shape)
    codes = jnp.clip(jnp.round(_quotient(groups, divisors)), -7, 7)
    return rearrange(codes, "... g i o -> ... (g i) o").astype(jnp.int4), scales


@checks_arguments
def dequantize_int4(
    codes: Int4[Array, "*batch in out"],
    scales: Float[Array, "*batch groups out"],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Float[Array, "*batch in out"]:
    """Returns bf16(code * scale) [..., in, out] in `dtype`: the weights that the reference model multiplies with.

    Raises:
      ValueError: codes are not int4, or the scales' shape is not the codes' with a thirty-second of the rows.
    """
    check_codes("dequantize_int4", codes, scales)
    wide = repeat(jnp.asarray(scales).astype(jnp.float32), "... g o -> ... (g i) o", i=GROUP_SIZE)
    product = jnp.asarray(codes).astype(jnp.float32) * wide
    # XLA may drop a float32 -> bf16 -> float32 pair of conversions (excess precision); it may not drop
    # reduce_precision.
    return jax.lax.reduce_precision(product, exponent_bits=8, mantissa_bits=7).astype(dtype)


@checks_arguments
def check_codes(op: str, codes: Int[Array, "..."], scales: Float[Array, "..."]) -> None:
    """Refuses all but int4 codes [..., in, out] (in is a multiple of 32) with floating scales [..., in/32, out].

    Raises:
      ValueError: any other shape or dtype.
    """
    if jnp.result_type(codes) != jnp.int4:
        raise ValueError(f"{op}: codes are {jnp.result_type(codes)}, expected int4")
    shape = jnp.shape(codes)
    if len(shape) < 2 or shape[-2] % GROUP_SIZE:
        raise ValueError(f"{op}: codes have shape {shape}, expected [..., in, out] with in a multiple of {GROUP_SIZE}")
    _check_scales(op, scales, (*shape[:-2], shape[-2] // GROUP_SIZE, shape[-1]), shape[-2])


def _quotient(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # XLA multiplies by the reciprocal of a constant or broadcast divisor, which rounds twice: hide where it comes from.
    return a / jax.lax.optimization_barrier(b)


@checks_arguments
def _check_scales(op: str, scales: Float[Array, "..."], expected: tuple[int, ...], columns: int) -> None:
    check_dtype(op, "scales", scales, jnp.floating)
    if columns % GROUP_SIZE or jnp.shape(scales) != expected:
        raise ValueError(
            f"{op}: scales have shape {jnp.shape(scales)}, expected {expected} "
            f"(groups of {GROUP_SIZE} along {columns} inputs)"
        )
