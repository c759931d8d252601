"""A mixture of experts in numpy float64: one token and one expert at a time."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.int4_matmul.reference import dequantize

ExpertMatrix = ArrayLike | tuple[ArrayLike, ArrayLike]


def mixture(
    x: ArrayLike,
    chosen: ArrayLike,
    weights: ArrayLike,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    first: int = 0,
) -> np.ndarray:
    """Maps x [T, K], chosen and weights [T, J], and matrices [E, out, in] or codes and scales, to float64 [T, K]."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    gate, up, down = (_matrices(weight) for weight in (gate, up, down))
    out = np.zeros_like(x)
    for t, experts in enumerate(np.asarray(chosen)):
        for expert, weight in zip(experts - first, weights[t], strict=True):
            if 0 <= expert < len(gate):
                gated = gate[expert] @ x[t]
                out[t] += weight * (down[expert] @ (gated / (1 + np.exp(-gated)) * (up[expert] @ x[t])))
    return out


def _matrices(weight: ExpertMatrix) -> np.ndarray:
    return dequantize(*weight).swapaxes(1, 2) if isinstance(weight, tuple) else np.asarray(weight, np.float64)
