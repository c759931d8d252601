"""Matrix product with INT4 weights in groups of 32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int4

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.formats.int4 import GROUP_SIZE, check_codes
from pallas_kernels.int4_matmul import mosaic_tpu, xla

_BACKENDS = (
    Backend("mosaic_tpu", mosaic_tpu.int4_matmul, ("tpu",), mosaic_tpu.unsupported),
    Backend("xla", xla.int4_matmul),
)


@checks_arguments
def int4_matmul(
    x: Float[Array, "M K"],
    codes: Int4[Array, "K N"],
    scales: Float[Array, "groups N"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiplies x by the dequantised weights bf16(code * scale), in x's dtype with float32 accumulation.

    Args:
      x: [M, K], floating point.
      codes: int4 [K, N], K a multiple of 32 (`unpack_int4` makes them of the published words).
      scales: [K//32, N], bf16 as published; one per 32 inputs and output.
      implementation: "mosaic_tpu" (x bf16 or float32, N a multiple of 128, K of 512 or at most 2048 and a multiple
        of 64), "xla", or None for the best that the platform has.

    Returns:
      [M, N] in x's dtype. Differentiable with respect to x only: scales and codes are constants.

    Raises:
      ValueError: shapes or dtypes other than these, or an implementation that is not there.
    """
    op = "int4_matmul"
    check_dtype(op, "x", x, jnp.floating)
    bind_shapes(op, x=(x, "M K"), codes=(codes, "K N"), scales=(scales, f"{jnp.shape(x)[-1] // GROUP_SIZE} N"))
    check_codes(op, codes, scales)
    x, codes, scales = map(jnp.asarray, (x, codes, scales))
    run = choose(op, implementation, _BACKENDS, x, codes, scales)
    return with_gradient(run, xla.int4_matmul)(x, codes, scales)
