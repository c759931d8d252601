"""Roundings that gradients pass straight through (arXiv 1308.3432)."""

from collections.abc import Callable

import jax
from jaxtyping import Array

Rounding = Callable[[Array], Array]


def straight_through(rounding: Rounding) -> Rounding:
    """Returns `rounding`, an array's map to one of the same shape and dtype, with the identity for its derivative."""
    rounded = jax.custom_jvp(rounding)

    @rounded.defjvp
    def identity(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return rounded(*primals), tangents[0]

    return rounded
