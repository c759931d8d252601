"""RMSNorm of a sum in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike


def add_norm(
    x: ArrayLike, y: ArrayLike, weight: ArrayLike, eps: float, rows: int | None = None, block: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Computes `api.add_norm`, without rounding."""
    x, y, weight = (np.asarray(array, np.float64) for array in (x, y, weight))
    total = x + y
    some = total if rows is None else total[block * rows : (block + 1) * rows]
    return total, some / np.sqrt(np.mean(some**2, axis=-1, keepdims=True) + eps) * weight
