"""INT4 matmul in numpy: the weights are dequantised in full, then multiplied.

Source of the meaning: compressed-tensors `pack-quantized` with group size 32; a weight is bf16(code * scale), as the
reference model rounds it.
"""

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike


def dequantize(codes: ArrayLike, scales: ArrayLike) -> np.ndarray:
    """Maps codes [..., K, N] and scales [..., K//32, N] to float64 [..., K, N] with the values bf16(code * scale)."""
    product = np.asarray(codes, np.float32) * np.repeat(np.asarray(scales, np.float32), 32, axis=-2)
    return product.astype(ml_dtypes.bfloat16).astype(np.float64)


def int4_matmul(x: ArrayLike, codes: ArrayLike, scales: ArrayLike) -> np.ndarray:
    """Maps x [M, K], codes [K, N] and scales [K//32, N] to float64 [M, N]."""
    return np.asarray(x, np.float64) @ dequantize(codes, scales)
