"""Grouped matmul in numpy float64: each group's rows times that group's matrix."""

import numpy as np
from numpy.typing import ArrayLike


def grouped_matmul(x: ArrayLike, weights: ArrayLike, group_sizes: ArrayLike, group_offset: int = 0) -> np.ndarray:
    """Maps x [T, K] sorted by group, weights [E, N, K] and group_sizes [groups] to float64 [T, N]."""
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
    """Returns silu(x gateᵀ) * (x upᵀ), float64 [T, N]."""
    gated = grouped_matmul(x, gate, group_sizes, group_offset)
    return gated / (1 + np.exp(-gated)) * grouped_matmul(x, up, group_sizes, group_offset)
