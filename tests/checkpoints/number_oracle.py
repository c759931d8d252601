"""Derives INT4, FP8 and bf16 in float64 from their definitions, element by element, without the code under test."""

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def bf16(value: np.ndarray) -> np.ndarray:
    """Rounds float64 to the nearest bf16, ties to even, returned as float64. It is exact for numbers that float32
    holds."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.rint(mantissa * 256), np.maximum(exponent, -125) - 8)


def e4m3(value: np.ndarray) -> np.ndarray:
    """Rounds float64 to the nearest e4m3, four significant bits down to 2^-9, returned as float32."""
    _, exponent = np.frexp(value)
    step = np.ldexp(1.0, np.maximum(exponent, -5) - 4)
    return np.rint(value / step) * step


def single(value: np.ndarray) -> np.ndarray:
    """Rounds float64 to the nearest float32, returned as float64."""
    return value.astype(np.float32).astype(np.float64)


def int4_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises weights, rounded to bf16 first, as in training: codes [out, in] and bf16 scales [out, in / 32] as
    float64."""
    groups = bf16(weight.astype(np.float64)).reshape(weight.shape[0], -1, 32)
    scale = bf16(single(np.abs(groups).max(-1) / 7))
    quotient = np.divide(groups, scale[..., None], where=scale[..., None] > 0, out=np.zeros_like(groups))
    return np.clip(np.rint(single(quotient)), -7, 7).reshape(weight.shape), scale


def from_int4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return bf16(codes.reshape(*scale.shape, 32) * scale[..., None]).reshape(codes.shape)


def codes_of(packed: np.ndarray) -> np.ndarray:
    """Unpacks int32 [out, in / 8] to codes [out, in], low nibble first, offset 8."""
    nibbles = [(packed.view(np.uint32) >> (4 * j)) & 15 for j in range(8)]
    return np.stack(nibbles, -1).reshape(packed.shape[0], -1).astype(np.float64) - 8


def fp8_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns e4m3 numbers and float32 scales of 128 x 128 blocks, as float64."""
    out, in_ = weight.shape
    scale = np.zeros((-(-out // 128), -(-in_ // 128)))
    found = np.zeros(weight.shape)
    for i, j in np.ndindex(scale.shape):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        w = weight[block].astype(np.float64)
        scale[i, j] = single(np.abs(w).max() / 448)
        if scale[i, j]:
            found[block] = e4m3(single(w / scale[i, j]))
    return found, scale


def from_fp8(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns the float32 products of e4m3 numbers and their scales, as float64."""
    out, in_ = weight.shape
    wide = scale.astype(np.float64).repeat(128, 0)[:out].repeat(128, 1)[:, :in_]
    return single(weight.astype(np.float64) * wide)
