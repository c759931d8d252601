"""MXFP4 weights: numbers of four bits (e2m1) in groups of 32 inputs with a power of two (e8m0) as their scale.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6.3; published as compressed-tensors
`mxfp4-pack-quantized`. A code is a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives. A byte has two codes, that of the even input in its low half. The scale's byte b stands for 2^(b - 127), 255
for NaN, which is refused where tensors are read or converted. Every product is a bf16 number, save below its range.

Functions take NumPy and JAX arrays, and return arrays of the kind that they are given.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels.formats.arrays import BF16, AnyArray, namespace
from pallas_kernels.formats.format import Part, Weight

GROUP_SIZE = 32
CODES_PER_BYTE = 2
NAN_SCALE = 255
# The exponents of float32's 1 and of the largest code, 6.
_BIAS, _LARGEST_EXPONENT = 127, 2
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
# The two numbers of each byte.
_PAIRS = np.stack([np.tile(_NUMBERS, 16), np.repeat(_NUMBERS, 16)], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mxfp4(Weight):
    """`codes` uint8 [..., in/2, out], two of a byte, and `scales` uint8 [..., in/32, out]: the published bytes,
    transposed so that x multiplies from the left. Both are constants: an op's gradient with respect to them is zero."""

    codes: Any
    scales: Any

    parts = (
        Part("codes", jnp.uint8, (1, CODES_PER_BYTE), transposed=True),
        Part("scales", jnp.uint8, (1, GROUP_SIZE), transposed=True),
    )
    stored = (
        Part("weight_packed", jnp.uint8, (1, CODES_PER_BYTE)),
        Part("weight_scale", jnp.uint8, (1, GROUP_SIZE)),
    )

    @classmethod
    def from_dense(cls, weight: Float[Array, "*batch out in"]) -> "Weight":
        """Quantises a weight. Raises ValueError where `in` is no multiple of 32."""
        if jnp.ndim(weight) < 2 or jnp.shape(weight)[-1] % GROUP_SIZE:
            raise ValueError(
                f"Mxfp4: weight has shape {jnp.shape(weight)}, "
                f"expected [..., out, in] with in a multiple of {GROUP_SIZE}"
            )
        return cls.from_stored(*quantize(jnp.asarray(weight)))

    @classmethod
    def from_stored(cls, *tensors: Array) -> "Weight":
        """Returns the weight of bytes [..., out, in/2] and scales [..., out, in/32]."""
        return cls(*(jnp.swapaxes(tensor, -1, -2) for tensor in tensors))

    def to_stored(self) -> tuple[Array, ...]:
        """Returns bytes [..., out, in/2] and scales [..., out, in/32]."""
        return tuple(jnp.swapaxes(array, -1, -2) for array in self.arrays)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
        """Returns code * scale."""
        codes, scales = self.to_stored()
        return dequantize(codes, scales, dtype or self.dtype)

    def check(self, op: str, name: str) -> None:
        """Raises ValueError where bytes are none, `in` is no multiple of 32, or scales are not theirs."""
        if self.shape[-1] % GROUP_SIZE:
            raise ValueError(f"{op}: {name} has {self.shape[-1]} inputs, expected a multiple of {GROUP_SIZE}")
        super().check(op, name)


def quantize(weight: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Returns bytes uint8 [..., out, in/2] and scales uint8 [..., out, in/32] of a weight [..., out, in].

    By section 6.3: the scale is the largest power of two in a group's largest magnitude, over that of the largest code
    (4); quotients are rounded to the nearest code, to the even one of two, and to 6 beyond it. The numbers of
    `dequantize` are a fixed point, though their scales need not be. A group of zeros has the scale 1, one that is not
    finite has NaN's.
    """
    xp = namespace(weight)
    groups = weight.astype(xp.float32).reshape(*weight.shape[:-1], -1, GROUP_SIZE)
    magnitudes = xp.abs(groups)
    largest = xp.max(magnitudes, axis=-1)
    exponents = largest.view(xp.int32) >> 23
    scales = xp.where(largest == 0, _BIAS, xp.maximum(exponents - _LARGEST_EXPONENT, 0))
    scales = xp.where(exponents == 255, NAN_SCALE, scales).astype(xp.int32)
    # 2^(127 - scale), which is exact
    quotients = magnitudes * xp.expand_dims((xp.maximum(2 * _BIAS - scales, 0) << 23).view(xp.float32), -1)
    codes = xp.signbit(groups).astype(xp.uint8) << xp.uint8(3)
    # Halfway between two codes, the even one is taken.
    for i in range(len(_MAGNITUDES) - 1):
        halfway = float(_MAGNITUDES[i] + _MAGNITUDES[i + 1]) / 2
        above = quotients >= halfway if i % 2 else quotients > halfway
        codes += above.astype(xp.uint8)
    codes = codes.reshape(weight.shape)
    return codes[..., ::2] | codes[..., 1::2] << xp.uint8(4), scales.astype(xp.uint8)


def dequantize(codes: AnyArray, scales: AnyArray, dtype: DTypeLike = BF16) -> AnyArray:
    """Returns code * scale [..., out, in] in `dtype` of bytes [..., out, in/2] and scales [..., out, in/32].

    A scale's byte of 255 gives NaN.
    """
    xp = namespace(codes)
    if isinstance(codes, np.ndarray):
        numbers = np.take(_PAIRS, codes, axis=0)
    else:
        numbers = _numbers(jnp.stack([codes & 0xF, codes >> 4], axis=-1))
    groups = numbers.reshape(*scales.shape, GROUP_SIZE)
    groups = groups * xp.expand_dims(_scale_numbers(scales), -1)
    return groups.reshape(*codes.shape[:-1], -1).astype(dtype)


def _scale_numbers(scales: AnyArray) -> AnyArray:
    """Returns 2^(byte - 127) in float32, NaN for 255."""
    xp = namespace(scales)
    bits = scales.astype(xp.int32) << 23
    bits = xp.where(scales == 0, 1 << 22, xp.where(scales == NAN_SCALE, 0x7FC00000, bits))
    return bits.astype(xp.int32).view(xp.float32)


def _numbers(codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Returns the numbers of codes without a table, which XLA would gather from one by one."""
    magnitudes = (codes & 7).astype(jnp.int32)
    # The bits are those of a float32 number, if 0 and 0.5 too had a leading one: then they are 0.5 and 0.75.
    normal = ((magnitudes << 22) + (126 << 23)).view(jnp.float32)
    numbers = jnp.minimum(normal, 2 * normal - 1)
    return jnp.where(codes >= 8, -numbers, numbers)
