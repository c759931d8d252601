"""Matrix product with one weight, plain or in any format."""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int4

from pallas_kernels import formats
from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.formats import Dense, Weight, as_weight
from pallas_kernels.formats.int4 import GROUP_SIZE, check_codes
from pallas_kernels.matmul import mosaic_int4, xla

_DEQUANTIZED = Backend("xla", xla.dequantized_matmul)
# By format; those that have no entry are dequantised.
_BACKENDS: dict[type[Weight], tuple[Backend, ...]] = {
    Dense: (Backend("xla", xla.dense_matmul),),
    **dict.fromkeys(
        (formats.Int4, formats.Mxfp4),
        (Backend("mosaic_tpu", mosaic_int4.matmul, ("tpu",), mosaic_int4.unsupported), _DEQUANTIZED),
    ),
}


@checks_arguments
def matmul(
    x: Float[Array, "*batch K"],
    weight: Weight | ArrayLike,
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """Multiplies x by a weight [N, K], which is [out, in] as Linears are published: x Wᵀ.

    Args:
      x: [..., K], floating point.
      weight: an array, or a weight of any format.
      dtype: of the result, x's where it is None. A quantised weight's product is rounded to x's first.
      implementation: "mosaic_tpu" (`Int4` and `Mxfp4`; x bf16 or float32, N a multiple of 128, K of 512 or at most
        2048 and a multiple of 64), "xla", or None for the best that the platform has.

    Returns:
      [..., N], accumulated in float32. Differentiable with respect to x, and to a dense weight; the parts of a
      quantised one are constants.

    Raises:
      ValueError: shapes or dtypes other than these, or an implementation that is not there.
    """
    return _multiply("matmul", x, weight, dtype, implementation)


@checks_arguments
def int4_matmul(
    x: Float[Array, "M K"],
    codes: Int4[Array, "K N"],
    scales: Float[Array, "groups N"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiplies x by the dequantised weights bf16(code * scale), in x's dtype with float32 accumulation.

    This is `matmul` with `formats.Int4(codes, scales)`.

    Args:
      x: [M, K], floating point.
      codes: int4 [K, N], K a multiple of 32 (`unpack_int4` makes them of the published words).
      scales: [K//32, N], bf16 as published; one per 32 inputs and output.
      implementation: see `matmul`.

    Returns:
      [M, N] in x's dtype. Differentiable with respect to x only: scales and codes are constants.

    Raises:
      ValueError: shapes or dtypes other than these, or an implementation that is not there.
    """
    op = "int4_matmul"
    check_dtype(op, "x", x, jnp.floating)
    bind_shapes(op, x=(x, "M K"), codes=(codes, "K N"), scales=(scales, f"{jnp.shape(x)[-1] // GROUP_SIZE} N"))
    check_codes(op, codes, scales)
    return _multiply(op, x, formats.Int4(codes, scales), None, implementation)


@checks_arguments
def _multiply(
    op: str, x: Array, weight: Weight | ArrayLike, dtype: DTypeLike | None, implementation: str | None
) -> Array:
    check_dtype(op, "x", x, jnp.floating)
    x, weight = jnp.asarray(x), as_weight(op, "weight", weight).operand(x.dtype)
    weight.check(op, "weight")
    inputs = bind_shapes(op, weight=(weight, "N K"))["K"]
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"{op}: x has shape {x.shape}, expected [..., {inputs}]")
    backends = _BACKENDS.get(type(weight), (_DEQUANTIZED,))
    if isinstance(weight, Dense):
        return choose(op, implementation, backends, x, weight)(x, weight).astype(dtype or x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    run = choose(op, implementation, backends, rows, weight)
    product = with_gradient(run, xla.dequantized_matmul)(rows, weight)
    return product.reshape(*x.shape[:-1], weight.shape[0]).astype(dtype or x.dtype)
