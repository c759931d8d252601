"""Grouped matmul in numpy float64: each group's rows times that group's matrix."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.formats import Weight
from pallas_kernels.formats.reference import numbers


def silu_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Computes silu(gate) * up."""
    return gate / (1 + np.exp(-gate)) * up


def grouped_matmul(
    x: ArrayLike, weights: Weight | ArrayLike, group_sizes: ArrayLike, group_offset: int = 0
) -> np.ndarray:
    """Maps x [T, K] sorted by group, weights [E, N, K] and group_sizes [groups] to float64 [T, N]."""
    x, weights = np.asarray(x, np.float64), numbers(weights)
    out = np.zeros((x.shape[0], weights.shape[1]))
    sizes = np.asarray(group_sizes)
    ends = np.cumsum(sizes)
    for expert, matrix in enumerate(weights):
        group = expert + group_offset
        rows = slice(ends[group] - sizes[group], ends[group])
        out[rows] = x[rows] @ matrix.T
    return out


def grouped_glu(
    x: ArrayLike,
    gate: Weight | ArrayLike,
    up: Weight | ArrayLike,
    group_sizes: ArrayLike,
    group_offset: int = 0,
    activation: Callable[[np.ndarray, np.ndarray], np.ndarray] = silu_gated,
) -> np.ndarray:
    """Returns activation(x gateᵀ, x upᵀ), float64 [T, N]."""
    return activation(*(grouped_matmul(x, weight, group_sizes, group_offset) for weight in (gate, up)))
