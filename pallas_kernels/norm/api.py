"""The sum that a residual stream becomes, and its RMSNorm (arXiv 1910.07467), of all rows or of some."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.norm import mosaic_tpu, xla


@checks_arguments
def add_norm(
    x: Float[Array, "T D"],
    y: Float[Array, "T D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    rows: int | None = None,
    block: Int[Array, ""] | int = 0,
    implementation: str | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "rows D"]]:
    """Adds y to x, and computes the RMSNorm of some rows of the sum.

    Args:
      x, y: [T, D]; weight: [D]; of one dtype.
      eps: that of the norm.
      rows, block: the norm is of block number `block` of so many rows each, by default of all rows.
      implementation: "mosaic_tpu" (bf16 or float32, D a multiple of 128, T at most 128, `rows` all or a multiple of
        8), "xla", or None for the best that the platform has.

    Returns:
      x + y [T, D], and [rows, D], v / sqrt(mean(v²) + eps) in float32, cast to x's dtype, times `weight`.
      Differentiable in x, y and weight.

    Raises:
      ValueError: shapes or dtypes other than these.
    """
    op = "add_norm"
    sizes = bind_shapes(op, x=(x, "T D"), y=(y, "T D"), weight=(weight, "D"))
    check_dtype(op, "x", x, jnp.floating)
    for name, array in (("y", y), ("weight", weight)):
        check_dtype(op, name, array, jnp.result_type(x))
    count = sizes["T"] if rows is None else rows
    if not 0 <= count <= sizes["T"]:
        raise ValueError(f"{op}: rows is {count}, expected 0 to {sizes['T']}")
    arguments = (*map(jnp.asarray, (x, y, weight)), jnp.asarray(block, jnp.int32))
    kernel, plain = (partial(module.add_norm, eps=eps, rows=count) for module in (mosaic_tpu, xla))
    backends = (
        Backend("mosaic_tpu", kernel, ("tpu",), partial(mosaic_tpu.unsupported, rows=count)),
        Backend("xla", plain),
    )
    return with_gradient(choose(op, implementation, backends, *arguments), plain)(*arguments)
