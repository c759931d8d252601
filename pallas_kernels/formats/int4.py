"""INT4 weights in groups of 32 inputs, in the layout that kernels read; the numbers are `int4_codec`'s."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32
from jaxtyping import Int4 as Int4Bits

from pallas_kernels.checks import check_dtype, checks_arguments
from pallas_kernels.formats import int4_codec
from pallas_kernels.formats.format import Part, Weight
from pallas_kernels.formats.int4_codec import CODES_PER_WORD, GROUP_SIZE

# One program instead of a dozen small ones for each shape.
_pack, _unpack = jax.jit(int4_codec.pack), jax.jit(int4_codec.unpack)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4(Weight):
    """`codes` int4 [..., in, out], so that x multiplies from the left, and `scales` [..., in/32, out].

    Both are constants: an op's gradient with respect to them is zero.
    """

    codes: Any
    scales: Any

    parts = (Part("codes", jnp.int4, transposed=True), Part("scales", None, (1, GROUP_SIZE), transposed=True))
    stored = (
        Part("weight_packed", jnp.int32, (1, CODES_PER_WORD)),
        Part("weight_scale", jnp.bfloat16, (1, GROUP_SIZE)),
    )
    stored_shape = "weight_shape"

    @classmethod
    def from_dense(cls, weight: Float[Array, "*batch out in"]) -> "Weight":
        """Quantises a weight."""
        return cls(*quantize_int4(jnp.swapaxes(weight, -1, -2)))

    @classmethod
    def from_stored(cls, *tensors: Array) -> "Weight":
        """Returns the weight of words int32 [..., out, in/8] and scales [..., out, in/32]."""
        return cls(*unpack_int4(*tensors))

    def to_stored(self) -> tuple[Array, ...]:
        """Returns words int32 [..., out, in/8] and scales [..., out, in/32]."""
        return pack_int4(self.codes, self.scales)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
        """Returns bf16(code * scale)."""
        return jnp.swapaxes(dequantize_int4(self.codes, self.scales, dtype or self.dtype), -1, -2)

    def check(self, op: str, name: str) -> None:
        """Raises ValueError where codes are no int4, or scales not theirs."""
        check_codes(op, self.codes, self.scales)


@checks_arguments
def unpack_int4(
    words: Int32[Array, "*batch out words"], scales: Float[Array, "*batch out groups"]
) -> tuple[Int4Bits[Array, "*batch in out"], Float[Array, "*batch groups out"]]:
    """Unpacks published words into the kernels' codes.

    Maps words int32 [..., out, in/8] and scales [..., out, in/32] to codes int4 [..., in, out] and scales [..., in/32,
    out].

    Raises:
      ValueError: words are not int32, or the scales' shape is not the words' with a quarter of the columns.
    """
    check_dtype("unpack_int4", "words", words, jnp.int32)
    *outer, columns = jnp.shape(words)
    _check_scales("unpack_int4", scales, (*outer, columns * CODES_PER_WORD // GROUP_SIZE), columns * CODES_PER_WORD)
    codes = jnp.swapaxes(_unpack(jnp.asarray(words)), -1, -2)
    return codes.astype(jnp.int4), jnp.swapaxes(jnp.asarray(scales), -1, -2)


@checks_arguments
def pack_int4(
    codes: Int4Bits[Array, "*batch in out"], scales: Float[Array, "*batch groups out"]
) -> tuple[Int32[Array, "*batch out words"], Float[Array, "*batch out groups"]]:
    """Packs codes [..., in, out] and scales [..., in/32, out] into words int32 [..., out, in/8] and scales [..., out,
    in/32].

    The inverse of `unpack_int4`.

    Raises:
      ValueError: codes are not int4, or the scales' shape is not the codes' with a thirty-second of the rows.
    """
    check_codes("pack_int4", codes, scales)
    words = _pack(jnp.swapaxes(jnp.asarray(codes), -1, -2))
    return words, jnp.swapaxes(jnp.asarray(scales), -1, -2)


@checks_arguments
def quantize_int4(
    weights: Float[Array, "*batch in out"],
) -> tuple[Int4Bits[Array, "*batch in out"], Float[Array, "*batch groups out"]]:
    """Quantises weights [..., in, out] to codes int4 -7..7 [..., in, out] and bf16 scales [..., in/32, out].

    A group of zeros gets scale 1. Dequantised weights are a fixed point: `dequantize_int4` of the result, quantised
    again, gives the same codes and scales. (With other scales this need not hold: for 14 of bf16's 128 significands no
    bf16 amax has that scale.)

    Raises:
      ValueError: weights are not floating point, or `in` is no multiple of 32.
    """
    check_dtype("quantize_int4", "weights", weights, jnp.floating)
    if jnp.ndim(weights) < 2 or jnp.shape(weights)[-2] % GROUP_SIZE:
        raise ValueError(
            f"quantize_int4: weights have shape {jnp.shape(weights)}, "
            f"expected [..., in, out] with in a multiple of {GROUP_SIZE}"
        )
    codes, scales = int4_codec.quantize(jnp.asarray(weights), axis=-2)
    return codes.astype(jnp.int4), jnp.where(scales == 0, jnp.ones_like(scales), scales)


@checks_arguments
def dequantize_int4(
    codes: Int4Bits[Array, "*batch in out"],
    scales: Float[Array, "*batch groups out"],
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "*batch in out"]:
    """Returns bf16(code * scale) [..., in, out] in `dtype`: the weights that the reference model multiplies with.

    Raises:
      ValueError: codes are not int4, or the scales' shape is not the codes' with a thirty-second of the rows.
    """
    check_codes("dequantize_int4", codes, scales)
    return int4_codec.dequantize(jnp.asarray(codes), jnp.asarray(scales), dtype, axis=-2)


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


@checks_arguments
def _check_scales(op: str, scales: Float[Array, "..."], expected: tuple[int, ...], columns: int) -> None:
    check_dtype(op, "scales", scales, jnp.floating)
    if columns % GROUP_SIZE or jnp.shape(scales) != expected:
        raise ValueError(
            f"{op}: scales have shape {jnp.shape(scales)}, expected {expected} "
            f"(groups of {GROUP_SIZE} along {columns} inputs)"
        )
