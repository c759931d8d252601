"""INT4 and MXFP4 matmul on TPUs: the grouped kernel with a single group of all rows."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul import mosaic_int4 as grouped


def unsupported(x: Array, weight: grouped.Packed) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    return grouped.unsupported(x, weight)


def matmul(x: Float[Array, "M K"], weight: grouped.Packed, *, interpret: Any = False) -> Float[Array, "M N"]:
    """See `api.matmul`."""
    only_group = jax.tree.map(lambda array: array[None], weight)
    return grouped.matmul(x, only_group, interpret=interpret)
