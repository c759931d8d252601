"""Grouped matmul, plainly: each group's rows times that group's matrix, in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike


def grouped_matmul(x: ArrayLike, weights: ArrayLike, group_sizes: ArrayLike, group_offset: int = 0) -> np.ndarray:
    """x [T, K] sorted by group, weights [E, N, K], group_sizes [groups] -> float64 [T, N]; see `api.grouped_matmul`."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    out = np.zeros((x.shape[0], weights.shape[1]))
    sizes = np.asarray(group_sizes)
    ends = np.cumsum(sizes)
    for expert, matrix in enumerate(weights):
        group = expert + group_offset
        rows = slice(ends[group] - sizes[group], ends[group])
        out[rows] = x[rows] @ matrix.T
    return out


def grouped_swiglu(
    x: ArrayLike, gate: ArrayLike, up: ArrayLike, group_sizes: ArrayLike, group_offset: int = 0
) -> np.ndarray:
    """silu(x gateᵀ) * (x upᵀ), float64 [T, N]."""
    gated = grouped_matmul(x, gate, group_sizes, group_offset)
    return gated / (1 + np.exp(-gated)) * grouped_matmul(x, up, group_sizes, group_offset)
