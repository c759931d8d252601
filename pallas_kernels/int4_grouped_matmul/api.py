"""Grouped matmul and SwiGLU with INT4 weights in groups of 32 inputs: a quantised mixture's experts.

"Groups" are the ragged batch's, one per expert; the 32 inputs that share a scale are always called by their number.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int4, Int32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.formats.int4 import GROUP_SIZE, check_codes
from pallas_kernels.grouped_matmul.api import check_groups
from pallas_kernels.int4_grouped_matmul import mosaic_tpu, xla

Quantised = tuple[Int4[Array, "E K N"], Float[Array, "E K32 N"]]

_MATMUL = (
    Backend("mosaic_tpu", mosaic_tpu.int4_grouped_matmul, ("tpu",), mosaic_tpu.unsupported),
    Backend("xla", xla.int4_grouped_matmul),
)
_SWIGLU = (
    Backend("mosaic_tpu", mosaic_tpu.int4_grouped_swiglu, ("tpu",), mosaic_tpu.unsupported_swiglu),
    Backend("xla", xla.int4_grouped_swiglu),
)


@checks_arguments
def int4_grouped_matmul(
    x: Float[Array, "T K"],
    codes: Int4[Array, "E K N"],
    scales: Float[Array, "E K32 N"],
    group_sizes: Int32[Array, "groups"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Multiplies each row by its group's dequantised matrix bf16(code * scale), in x's dtype with float32 accumulation.

    Args:
      x: [T, K], rows sorted by group.
      codes: int4 [E, K, N], K a multiple of 32.
      scales: [E, K//32, N], bf16 as published.
      group_sizes: int32 [groups], rows of every group, also of those on other devices; their sum is at most T.
      group_offset: the codes are those of groups [group_offset, group_offset + E); None says that they are all groups'.
      implementation: "mosaic_tpu" (x bf16 or float32, N a multiple of 128, K of 512 or at most 2048 and a multiple
        of 64), "xla", or None for the best that the platform has.

    Returns:
      [T, N] in x's dtype. Rows of groups on other devices, and rows past the last group, are zero.
      Differentiable with respect to x; codes and scales are constants.

    Raises:
      ValueError: shapes or dtypes other than these, groups that are not there, or (where the values are known) group
        sizes that are negative or exceed T.
    """
    op = "int4_grouped_matmul"
    offset = _check(op, x, (codes, scales), group_sizes, group_offset)
    arguments = tuple(map(jnp.asarray, (x, codes, scales, group_sizes, offset)))
    run = choose(op, implementation, _MATMUL, *arguments)
    return with_gradient(run, xla.int4_grouped_matmul)(*arguments)


@checks_arguments
def int4_grouped_swiglu(
    x: Float[Array, "T K"],
    gate: Quantised,
    up: Quantised,
    group_sizes: Int32[Array, "groups"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Computes silu(x gate) * (x up) of each row with its group's matrices, in one pass over the rows.

    `gate` and `up` are each (codes, scales) of one shape; the other arguments are those of `int4_grouped_matmul`.
    """
    op = "int4_grouped_swiglu"
    offset = _check(op, x, gate, group_sizes, group_offset)
    _check(op, x, up, group_sizes, group_offset)
    if jnp.shape(gate[0]) != jnp.shape(up[0]):
        raise ValueError(
            f"{op}: up's codes have shape {jnp.shape(up[0])}, expected those of gate, {jnp.shape(gate[0])}"
        )
    arguments = jax.tree.map(jnp.asarray, (x, tuple(gate), tuple(up), group_sizes, offset))
    run = choose(op, implementation, _SWIGLU, *arguments)
    return with_gradient(run, xla.int4_grouped_swiglu)(*arguments)


@checks_arguments
def _check(
    op: str,
    x: Float[Array, "T K"],
    weights: Quantised,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""] | int | None,
) -> Int32[Array, ""]:
    codes, scales = weights
    check_dtype(op, "x", x, jnp.floating)
    bind_shapes(
        op,
        x=(x, "T K"),
        codes=(codes, "E K N"),
        scales=(scales, f"E {jnp.shape(x)[-1] // GROUP_SIZE} N"),
        group_sizes=(group_sizes, "groups"),
    )
    check_codes(op, codes, scales)
    return check_groups(op, x, group_sizes, group_offset, jnp.shape(codes)[0])
