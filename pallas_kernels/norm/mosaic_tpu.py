"""The sum of a few rows and the RMSNorm of some of them, as one Pallas kernel for TPUs.

All is in vector memory, where messages leave their results. XLA makes three operations of it, each of which takes
longer to begin than to compute.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hardware import LANES, SUBLANES, VMEM_LIMIT

MOST_ROWS = 128
# Rows that are worked on at a time, a bf16 register's, and columns: a quarter of the registers in float32.
PART, COLUMNS = 16, 1024


def unsupported(x: Array, y: Array, weight: Array, block: Array, *, rows: int) -> str | None:
    """Says why the kernel cannot take these arguments; None where it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if not 0 < len(x) <= MOST_ROWS or not rows:
        return f"there are {len(x)} rows, of which {rows} are normed, expected 1 to {MOST_ROWS}"
    if rows < len(x) and rows % SUBLANES:
        return f"{rows} of {len(x)} rows are normed, expected all or a multiple of {SUBLANES}"
    if x.shape[1] % LANES or not x.shape[1]:
        return f"rows have {x.shape[1]} numbers, expected a multiple of {LANES}"
    return None


def add_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "T D"],
    weight: Float[Array, "D"],
    block: Int32[Array, ""],
    *,
    eps: float,
    rows: int,
    interpret: Any = False,
) -> tuple[Float[Array, "T D"], Float[Array, "rows D"]]:
    """See `api.add_norm`."""
    vector, whole = pl.BlockSpec(memory_space=pltpu.VMEM), rows == len(x)
    return pl.pallas_call(
        partial(_add_norm_kernel, eps=eps),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[vector] * 3],
        out_specs=[vector] * 2,
        out_shape=[jax.ShapeDtypeStruct((count, x.shape[1]), x.dtype) for count in (len(x), rows)],
        scratch_shapes=[] if whole else [pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size + 4 * rows * x.shape[1], transcendentals=rows, bytes_accessed=3 * x.nbytes
        ),
        name="add_norm",
        interpret=interpret,
    )(block.reshape(1), x, y, weight)


def _add_norm_kernel(
    block: Any, x_ref: Any, y_ref: Any, weight_ref: Any, total_ref: Any, normed_ref: Any, *arrived: Any, eps: float
) -> None:
    def add(part: Any) -> None:
        for columns in _columns(x_ref.shape[1]):
            total = x_ref[part, columns].astype(jnp.float32) + y_ref[part, columns].astype(jnp.float32)
            total_ref[part, columns] = total.astype(total_ref.dtype)

    def norm(part: Any, source_ref: Any) -> None:
        squares = sum(_squares(source_ref[part, columns]) for columns in _columns(x_ref.shape[1]))
        inverse = lax.rsqrt(squares / x_ref.shape[1] + eps)
        for columns in _columns(x_ref.shape[1]):
            normed_ref[part, columns] = _scaled(source_ref[part, columns], inverse, weight_ref[columns])

    if not arrived:

        def add_and_norm(part: Any) -> None:
            add(part)
            norm(part, total_ref)

        _for_parts(x_ref.shape[0], add_and_norm)
        return
    _for_parts(x_ref.shape[0], add)
    # A copy begins at any row, a register does not.
    rows = normed_ref.shape[0]
    first = pl.multiple_of(block[0] * rows, SUBLANES)
    copy = pltpu.make_async_copy(total_ref.at[pl.ds(first, rows), :], normed_ref, arrived[0])
    copy.start()
    copy.wait()
    _for_parts(rows, partial(norm, source_ref=normed_ref))


def _for_parts(rows: int, use: Callable[[Any], None]) -> None:
    """Calls `use` with slices of `PART` rows, and of what is left of them."""
    parts = rows // PART
    if parts > 1:
        lax.fori_loop(0, parts, lambda i, _: use(pl.ds(pl.multiple_of(i * PART, PART), PART)), None)
    elif parts:
        use(pl.ds(0, PART))
    if rows % PART:
        use(pl.ds(parts * PART, rows % PART))


def _columns(width: int) -> list[slice]:
    return [slice(first, min(first + COLUMNS, width)) for first in range(0, width, COLUMNS)]


def _squares(x: Float[Array, "rows columns"]) -> Float32[Array, "rows 1"]:
    return jnp.sum(x.astype(jnp.float32) ** 2, axis=1, keepdims=True)


def normed(x: Float[Array, "rows d"], weight: Float[Array, "d"], eps: float) -> Float[Array, "rows d"]:
    """Computes `xla.rms_norm` within a kernel."""
    return _scaled(x, lax.rsqrt(_squares(x) / x.shape[1] + eps), weight)


def _scaled(x: Array, inverse: Array, weight: Array) -> Array:
    y = (x.astype(jnp.float32) * inverse).astype(x.dtype)
    return (y.astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)
