"""The numbers of published weights, in numpy: bf16, INT4 and MXFP4 in groups of 32 inputs, FP8 in blocks of
128 x 128.

The codecs are those of the kernels, `pallas_kernels.formats`. Here they are given whole rows of a weight [out, in],
and refuse numbers that are not finite. Beside its arguments and results a call holds at most 16 bytes per weight, so
callers that stream give it some rows at a time (128 of 7,168 columns: 15 MB).
"""

import numpy as np

from pallas_kernels.formats import fp8, int4_codec, mxfp4
from pallas_kernels.formats.arrays import BF16 as BF16
from pallas_kernels.formats.fp8 import BLOCK as BLOCK
from pallas_kernels.formats.fp8 import E4M3
from pallas_kernels.formats.int4_codec import GROUP_SIZE as GROUP_SIZE

F32 = np.dtype(np.float32)
INT32 = np.dtype(np.int32)
UINT8 = np.dtype(np.uint8)
FP8 = E4M3


def quantize_int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a weight [out, in] in any float to words int32 [out, in / 8] and scales bf16 [out, in / 32].

    A group of zeros has the scale 0. Raises ValueError if the input dimension is not a multiple of 32, or a weight is
    not finite.
    """
    if weight.ndim != 2 or weight.shape[1] % GROUP_SIZE:
        raise ValueError(f"shape {list(weight.shape)}, expected [out, in] with in a multiple of {GROUP_SIZE}")
    with np.errstate(invalid="ignore"):  # refused below, by their scale
        codes, scales = int4_codec.quantize(weight)
    _check_finite(scales)
    return int4_codec.pack(codes), scales


def dequantize_int4(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns bf16 [out, in] = bf16(code * scale) of words int32 [out, in / 8] and scales bf16 [out, in / 32].

    Raises ValueError if a scale is not finite.
    """
    _check_finite(scales)
    return int4_codec.dequantize(int4_codec.unpack(words), scales)


def quantize_mxfp4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a weight [out, in] in any float to bytes uint8 [out, in / 2] and scales uint8 [out, in / 32].

    Raises ValueError if the input dimension is not a multiple of 32, or a weight is not finite.
    """
    if weight.ndim != 2 or weight.shape[1] % GROUP_SIZE:
        raise ValueError(f"shape {list(weight.shape)}, expected [out, in] with in a multiple of {GROUP_SIZE}")
    with np.errstate(invalid="ignore"):  # refused below, by their scale
        codes, scales = mxfp4.quantize(weight)
    _check_scales(scales)
    return codes, scales


def dequantize_mxfp4(codes: np.ndarray, scales: np.ndarray, dtype: np.dtype = BF16) -> np.ndarray:
    """Returns code * scale in `dtype` of bytes uint8 [out, in / 2] and scales uint8 [out, in / 32].

    Raises ValueError if a scale is 255.
    """
    _check_scales(scales)
    return mxfp4.dequantize(codes, scales, dtype)


def quantize_fp8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a weight [out, in] in any float to e4m3, and scale_inv float32 [ceil(out / 128), ceil(in / 128)].

    A block of zeros has the scale 0. Raises ValueError if a weight is not finite.
    """
    with np.errstate(invalid="ignore"):  # refused below, by their scale
        values, scales = fp8.quantize(weight)
    _check_finite(scales)
    return values, scales


def dequantize_fp8(weight: np.ndarray, scale_inv: np.ndarray, dtype: np.dtype = BF16) -> np.ndarray:
    """Returns float32(w) * scale_inv in `dtype` of e4m3 [out, in] and float32 [ceil(out / 128), ceil(in / 128)].

    Raises ValueError if a weight or a scale is not finite.
    """
    _check_finite(scale_inv)
    if (weight.view(np.uint8) & 0x7F == 0x7F).any():  # e4m3's only NaN; it has no infinity
        raise ValueError("holds NaN or infinity")
    return fp8.dequantize(weight, scale_inv, dtype)


def _check_scales(scales: np.ndarray) -> None:
    if (scales == mxfp4.NAN_SCALE).any():
        raise ValueError("holds NaN or infinity")


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values.astype(np.float32)).all():
        raise ValueError("holds NaN or infinity")
