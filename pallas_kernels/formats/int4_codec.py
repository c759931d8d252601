"""INT4 in groups of 32 inputs: the one codec, for NumPy arrays (checkpoints) and for JAX arrays (kernels) alike.

Published (compressed-tensors `pack-quantized`, as Moonshot ships it) is the symmetric form of Kimi's quantisation-aware
training. The weights are rounded to bf16. Each group of 32 along `in` has scale = bf16(amax / 7), and codes -7..7,
round_half_even(w / scale) of a float32 quotient. Read back, a weight is bf16(code * scale), the product in float32.
Stored are code + 8, eight to an int32, the low nibble first. What `dequantize` gives of the quantiser's result is a
fixed point: of the scales s that share bf16(7 s), one at the most is bf16(amax / 7) of a bf16 amax.

Each function returns arrays of the kind that it is given, and takes any leading axes. `axis` counts the inputs: -1 for
[..., out, in] as published, -2 for [..., in, out] as kernels have it.
"""

from jax.typing import DTypeLike

from pallas_kernels.formats.arrays import BF16, AnyArray, divide, namespace, round_to_bf16, round_within

GROUP_SIZE = 32
CODES_PER_WORD = 8
LARGEST_CODE, CODE_OFFSET = 7, 8


def quantize(weight: AnyArray, axis: int = -1) -> tuple[AnyArray, AnyArray]:
    """Returns codes int8 of the weight's shape, and bf16 scales with a thirty-second of its inputs.

    A group of zeros has the scale 0. A group that is not finite has a scale that is not.
    """
    xp = namespace(weight)
    groups = _split(round_to_bf16(weight), axis)
    scales = divide(xp.max(xp.abs(groups), axis=axis), 7).astype(BF16)
    divisors = xp.where(scales == 0, 1, scales.astype(xp.float32))
    codes = round_within(divide(groups, xp.expand_dims(divisors, axis)), LARGEST_CODE)
    return codes.astype(xp.int8).reshape(weight.shape), scales


def dequantize(codes: AnyArray, scales: AnyArray, dtype: DTypeLike = BF16, axis: int = -1) -> AnyArray:
    """Returns bf16(code * scale) in `dtype`, of the codes' shape."""
    xp = namespace(codes)
    product = _split(codes.astype(xp.float32), axis)
    product *= xp.expand_dims(scales.astype(xp.float32), axis)
    return round_to_bf16(product, dtype).reshape(codes.shape)


def pack(codes: AnyArray) -> AnyArray:
    """Packs codes [..., out, in] into int32 words [..., out, in/8]."""
    xp = namespace(codes)
    nibbles = codes.astype(xp.int8) + xp.int8(CODE_OFFSET)
    words = xp.zeros((*codes.shape[:-1], codes.shape[-1] // CODES_PER_WORD), xp.int32)
    for place in range(CODES_PER_WORD):
        words |= nibbles[..., place::CODES_PER_WORD].astype(xp.int32) << 4 * place
    return words


def unpack(words: AnyArray) -> AnyArray:
    """Unpacks int32 words [..., out, in/8] into codes int8 [..., out, in]; the inverse of `pack`."""
    xp = namespace(words)
    nibbles = [(words >> 4 * place).astype(xp.int8) & xp.int8(0xF) for place in range(CODES_PER_WORD)]
    codes = xp.stack(nibbles, axis=-1) - xp.int8(CODE_OFFSET)
    return codes.reshape(*words.shape[:-1], -1)


def _split(array: AnyArray, axis: int) -> AnyArray:
    """Splits the inputs at `axis` into groups, [..., groups, 32] at -1 or [..., groups, 32, out] at -2."""
    shape = array.shape
    place = array.ndim + axis
    return array.reshape(*shape[:place], shape[place] // GROUP_SIZE, GROUP_SIZE, *shape[place + 1 :])
