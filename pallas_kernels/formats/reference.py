"""The numbers that a weight stands for, in numpy float64: what the ops' references multiply by."""

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.formats.format import Weight
from pallas_kernels.formats.int4 import Int4


def numbers(weight: Weight | ArrayLike) -> np.ndarray:
    """Maps an array or a weight of any format to float64 [..., out, in]."""
    if isinstance(weight, Int4):
        return dequantize_int4(weight.codes, weight.scales).swapaxes(-1, -2)
    return np.asarray(weight.dequantize(np.float32) if isinstance(weight, Weight) else weight, np.float64)


def dequantize_int4(codes: ArrayLike, scales: ArrayLike) -> np.ndarray:
    """Maps codes [..., K, N] and scales [..., K//32, N] to float64 [..., K, N] with the values bf16(code * scale).

    Source: compressed-tensors `pack-quantized` with group size 32; the reference model rounds to bf16.
    """
    product = np.asarray(codes, np.float32) * np.repeat(np.asarray(scales, np.float32), 32, axis=-2)
    return product.astype(ml_dtypes.bfloat16).astype(np.float64)
