"""Grouped matmul with INT4 weights in numpy float64: the dense reference with the dequantised matrices."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.grouped_matmul import reference as dense
from pallas_kernels.int4_matmul.reference import dequantize

Quantised = tuple[ArrayLike, ArrayLike]


def int4_grouped_matmul(
    x: ArrayLike, codes: ArrayLike, scales: ArrayLike, group_sizes: ArrayLike, group_offset: int = 0
) -> np.ndarray:
    """Maps x [T, K], codes [E, K, N], scales [E, K//32, N] and group_sizes [groups] to float64 [T, N]."""
    return dense.grouped_matmul(x, _matrices((codes, scales)), group_sizes, group_offset)


def int4_grouped_swiglu(
    x: ArrayLike, gate: Quantised, up: Quantised, group_sizes: ArrayLike, group_offset: int = 0
) -> np.ndarray:
    """Returns silu(x gate) * (x up), float64 [T, N]."""
    return dense.grouped_swiglu(x, _matrices(gate), _matrices(up), group_sizes, group_offset)


def _matrices(weights: Quantised) -> np.ndarray:
    """Dequantises to [E, N, K], as the dense op takes matrices."""
    return dequantize(*weights).swapaxes(1, 2)
