"""Matrix product in numpy float64: the weight is dequantised in full, then multiplied."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.formats import Weight
from pallas_kernels.formats.reference import numbers


def matmul(x: ArrayLike, weight: Weight | ArrayLike) -> np.ndarray:
    """Maps x [..., K] and a weight [N, K] to float64 [..., N]."""
    return np.asarray(x, np.float64) @ numbers(weight).T
