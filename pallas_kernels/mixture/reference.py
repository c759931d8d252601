"""A mixture of experts in numpy float64: one token and one expert at a time."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.formats import Weight
from pallas_kernels.formats.reference import numbers
from pallas_kernels.grouped_matmul.reference import silu_gated


def mixture(
    x: ArrayLike,
    chosen: ArrayLike,
    weights: ArrayLike,
    gate: Weight | ArrayLike,
    up: Weight | ArrayLike,
    down: Weight | ArrayLike,
    first: int = 0,
    activation: Callable[[np.ndarray, np.ndarray], np.ndarray] = silu_gated,
) -> np.ndarray:
    """Maps x [T, K], chosen and weights [T, J], and weights [E, out, in] of any format, to float64 [T, K]."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    gate, up, down = (numbers(weight) for weight in (gate, up, down))
    out = np.zeros_like(x)
    for t, experts in enumerate(np.asarray(chosen)):
        for expert, weight in zip(experts - first, weights[t], strict=True):
            if 0 <= expert < len(gate):
                out[t] += weight * (down[expert] @ activation(gate[expert] @ x[t], up[expert] @ x[t]))
    return out
