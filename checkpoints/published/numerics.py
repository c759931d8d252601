"""The numbers of published weights: bf16, INT4 in groups of 32 inputs, FP8 in blocks of 128 x 128.

INT4 is the convention of Kimi's quantisation-aware training: along the input dimension, scale = bf16(amax / 7),
q = clip(round_half_even(w / scale), -7, 7) of a quotient in float32, stored as q + 8, eight to an int32, low nibble
first; read back as bf16(q * scale). FP8 is DeepSeek-V3's (arXiv 2412.19437, section 3.3): e4m3, scale_inv = amax / 448
in float32, a block's numbers w / scale_inv rounded half to even; read back as bf16(w * scale_inv), the product in
float32. The last blocks of a dimension that 128 does not divide are smaller.

All of it is numpy on whole rows, a few passes each. Beside its arguments and results a call holds at most 16 bytes per
weight, so callers that stream give it some rows at a time (128 of 7,168 columns: 15 MB).
"""

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
GROUP_SIZE = 32
BLOCK = 128
CODES_PER_WORD = 8
_FP8_MAX = np.float32(448)

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
# The two codes of a byte, as float32 pairs side by side in eight bytes.
_BYTE = np.arange(256)
_PAIRS = (np.stack([_BYTE & 15, _BYTE >> 4], 1) - 8).astype(np.float32).view(np.uint64)[:, 0]
with np.errstate(invalid="ignore"):  # NaNs are among the 65,536
    _FP8_OF_BF16 = np.arange(65536, dtype=np.uint16).view(BF16).astype(np.float32).astype(FP8).view(np.uint8)


def quantize_int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed int32 [out, in / 8] and scale bf16 [out, in / 32] of a weight [out, in] in any float.

    The weight is rounded to bf16 first, as the weights that are trained are bf16. Only then is what `dequantize_int4`
    gives a fixed point: of the scales s that share bf16(7 s), one at the most is bf16(amax / 7) of a bf16 amax. A group
    of zeros has the scale 0.

    Raises ValueError if the input dimension is not a multiple of 32, or a weight is not finite.
    """
    if weight.ndim != 2 or weight.shape[1] % GROUP_SIZE:
        raise ValueError(f"shape {list(weight.shape)}, expected [out, in] with in a multiple of {GROUP_SIZE}")
    groups = weight.astype(BF16).astype(np.float32).reshape(weight.shape[0], -1, GROUP_SIZE)
    scale = (_finite(np.abs(groups).max(-1)) / np.float32(7)).astype(BF16)
    groups /= np.where(scale == 0, np.float32(1), scale.astype(np.float32))[..., None]
    codes = np.rint(groups, out=groups).clip(-7, 7, out=groups).astype(np.int8).view(np.uint8)
    codes += np.uint8(8)
    pairs = codes.reshape(weight.shape).view(np.uint16)  # little-endian: the earlier column in the low byte
    return (pairs | (pairs >> 4)).astype(np.uint8).view(np.int32), scale


def dequantize_int4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """bf16 [out, in] = bf16(q * scale) of packed int32 [out, in / 8] and scale bf16 [out, in / 32]."""
    q = np.take(_PAIRS, np.ascontiguousarray(packed).view(np.uint8)).view(np.float32).reshape(*scale.shape, GROUP_SIZE)
    q *= _finite(scale.astype(np.float32))[..., None]
    return q.astype(BF16).reshape(packed.shape[0], -1)


def quantize_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 [out, in] and scale_inv float32 [ceil(out / 128), ceil(in / 128)] of a weight [out, in] in any float.

    A block of zeros has the scale 0. Raises ValueError if a weight is not finite.
    """
    values = weight.astype(np.float32)
    amax = np.stack([np.abs(values[row : row + BLOCK]).max(0) for row in range(0, weight.shape[0], BLOCK)])
    scale = _finite(np.maximum.reduceat(amax, np.arange(0, weight.shape[1], BLOCK), axis=1)) / _FP8_MAX
    values /= _per_weight(np.where(scale == 0, np.float32(1), scale), weight.shape)
    # Cut to bf16's bits with the last one set if anything was lost, a number rounds to e4m3's fewer as it would whole.
    bits = values.view(np.uint32)
    cut = (bits >> 16).astype(np.uint16)
    cut |= (bits & 0xFFFF) != 0
    return np.take(_FP8_OF_BF16, cut).view(FP8), scale


def dequantize_fp8(weight: np.ndarray, scale_inv: np.ndarray, dtype: np.dtype = BF16) -> np.ndarray:
    """[out, in] in `dtype` = float32(w) * scale_inv of e4m3 [out, in] and float32 [ceil(out / 128), ceil(in / 128)].

    Raises ValueError if a weight or a scale is not finite.
    """
    values = np.take(_FP8_VALUES, weight.view(np.uint8))
    _finite(values.max(0))  # e4m3 has no infinity; a NaN wins every maximum
    values *= _per_weight(_finite(scale_inv), weight.shape)
    return values.astype(dtype)


def _per_weight(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every block's scale at each of its weights."""
    rows = np.repeat(scale, BLOCK, axis=1)[:, : shape[1]]
    return rows if shape[0] <= BLOCK else np.repeat(rows, BLOCK, axis=0)[: shape[0]]


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("holds NaN or infinity")
    return values
