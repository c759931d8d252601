"""INT4 matmul on TPUs: the grouped kernel with a single group of all rows."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int4

from pallas_kernels.int4_grouped_matmul import mosaic_tpu as grouped


def unsupported(x: Array, codes: Array, scales: Array) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    return grouped.unsupported(x, codes)


def int4_matmul(
    x: Float[Array, "M K"], codes: Int4[Array, "K N"], scales: Float[Array, "groups N"], *, interpret: Any = False
) -> Float[Array, "M N"]:
    """See `api.int4_matmul`."""
    every_row = jnp.full(1, x.shape[0], jnp.int32)
    return grouped.int4_grouped_matmul(x, codes[None], scales[None], every_row, jnp.int32(0), interpret=interpret)
