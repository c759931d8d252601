"""Matrix products of a ragged batch: rows sorted by group, one weight matrix per group (a mixture's experts).

Source of the form: megablocks (arXiv 2211.15841) and `jax.lax.ragged_dot`, with an offset for experts spread over
devices.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments, known
from pallas_kernels.dispatch import Backend, choose, with_gradient
from pallas_kernels.grouped_matmul import mosaic_tpu, xla

_MATMUL = (
    Backend("mosaic_tpu", mosaic_tpu.grouped_matmul, ("tpu",), mosaic_tpu.unsupported),
    Backend("xla", xla.grouped_matmul),
)
_SWIGLU = (
    Backend("mosaic_tpu", mosaic_tpu.grouped_swiglu, ("tpu",), mosaic_tpu.unsupported),
    Backend("xla", xla.grouped_swiglu),
)


@checks_arguments
def grouped_matmul(
    x: Float[Array, "T K"],
    weights: Float[Array, "E N K"],
    group_sizes: Int32[Array, "groups"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Multiplies each row by its group's matrix: x Wᵀ with W [N, K] ([out, in], as Linears are published).

    Only the matrices of groups with rows are read.

    Args:
      x: [T, K], rows sorted by group.
      weights: [E, N, K], in x's dtype.
      group_sizes: int32 [groups], rows of every group, also of those on other devices; their sum is at most T.
      group_offset: `weights` are those of groups [group_offset, group_offset + E); None says that they are all groups'.
      implementation: "mosaic_tpu" (x bf16 or float32, N and K multiples of 128), "xla", or None for the best that the
        platform has.

    Returns:
      [T, N] in x's dtype, accumulated in float32. Rows of groups on other devices, and rows past the last group,
      are zero. Differentiable with respect to x and weights.

    Raises:
      ValueError: shapes or dtypes other than these, groups that are not there, or (where the values are known) group
        sizes that are negative or exceed T.
    """
    op = "grouped_matmul"
    check_dtype(op, "x", x, jnp.floating)
    check_dtype(op, "weights", weights, jnp.result_type(x))
    bind_shapes(op, x=(x, "T K"), weights=(weights, "E N K"), group_sizes=(group_sizes, "groups"))
    offset = check_groups(op, x, group_sizes, group_offset, jnp.shape(weights)[0])
    arguments = tuple(map(jnp.asarray, (x, weights, group_sizes, offset)))
    run = choose(op, implementation, _MATMUL, *arguments)
    return with_gradient(run, xla.grouped_matmul)(*arguments)


@checks_arguments
def grouped_swiglu(
    x: Float[Array, "T K"],
    gate: Float[Array, "E N K"],
    up: Float[Array, "E N K"],
    group_sizes: Int32[Array, "groups"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Computes silu(x gateᵀ) * (x upᵀ) of each row with its group's matrices, in one pass over the rows.

    `gate` and `up` are each [E, N, K]; the other arguments are those of `grouped_matmul`.
    """
    op = "grouped_swiglu"
    check_dtype(op, "x", x, jnp.floating)
    check_dtype(op, "gate", gate, jnp.result_type(x))
    check_dtype(op, "up", up, jnp.result_type(x))
    bind_shapes(op, x=(x, "T K"), gate=(gate, "E N K"), up=(up, "E N K"), group_sizes=(group_sizes, "groups"))
    offset = check_groups(op, x, group_sizes, group_offset, jnp.shape(gate)[0])
    arguments = tuple(map(jnp.asarray, (x, gate, up, group_sizes, offset)))
    run = choose(op, implementation, _SWIGLU, *arguments)
    return with_gradient(run, xla.grouped_swiglu)(*arguments)


@checks_arguments
def check_groups(
    op: str,
    x: Float[Array, "T K"],
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""] | int | None,
    num_local: int,
) -> Int32[Array, ""]:
    """Returns the offset as an int32 scalar, after refusing group sizes and offsets that cannot be.

    Raises:
      ValueError: see `grouped_matmul`.
    """
    check_dtype(op, "group_sizes", group_sizes, jnp.int32)
    groups, rows = jnp.shape(group_sizes)[0], jnp.shape(x)[0]
    if num_local > groups or num_local < 1 or (group_offset is None and num_local != groups):
        raise ValueError(f"{op}: group_sizes has {groups} groups, expected one for each of the {num_local} matrices")
    sizes, offset = known(group_sizes), known(0 if group_offset is None else group_offset)
    if sizes is not None and (sizes.min() < 0 or sizes.sum() > rows):
        raise ValueError(
            f"{op}: group_sizes are {sizes.min()} at least and {sizes.sum()} in all, "
            f"expected 0 and at most the {rows} rows of x"
        )
    if offset is not None and not 0 <= offset <= groups - num_local:
        raise ValueError(
            f"{op}: group_offset is {offset}, expected 0 to {groups - num_local} "
            f"({num_local} of {groups} groups are here)"
        )
    return jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
