"""Measures a kernel's error against a float64 result, and lists its products."""

from typing import Any

import numpy as np
from jax.extend.core import jaxprs_in_params


def relative_rmse(found: Any, expected: Any) -> float:
    """Returns the root mean square of the difference over that of the expected values; 0 for empty arrays."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.size:
        return 0.0
    assert np.isfinite(found).all()
    size = np.sqrt(np.mean(expected**2))
    error = np.sqrt(np.mean((found - expected) ** 2))
    return float(error / size) if size else float(error)


def dots(jaxpr):
    """Yields every dot_general of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from dots(inner)
