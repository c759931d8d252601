"""The choice of experts in numpy float64, one token at a time."""

import numpy as np
from numpy.typing import ArrayLike


def route(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike,
    *,
    choices: int,
    groups: int = 1,
    kept_groups: int = 1,
    normalize: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Maps x [T, D], weight [E, D] and bias [E] to the chosen experts, int64 [T, J], and their weights, float64."""
    x, weight, bias = (np.asarray(array, np.float64) for array in (x, weight, bias))
    chosen, weights, size = [], [], len(weight) // groups
    for token in x:
        scores = 1 / (1 + np.exp(-weight @ token))
        choice = (scores + bias).reshape(groups, size)
        of_groups = np.sort(choice, axis=1)[:, -2:].sum(axis=1)
        dropped = np.argsort(-of_groups, kind="stable")[kept_groups:]
        choice[dropped] = -np.inf
        best = np.argsort(-choice.reshape(-1), kind="stable")[:choices]
        total = scores[best].sum() + 1e-20 if normalize else 1.0
        chosen.append(best)
        weights.append(scores[best] / total * scale)
    return np.array(chosen, np.int64).reshape(-1, choices), np.array(weights).reshape(-1, choices)
