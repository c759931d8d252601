"""Matrix products of a ragged batch: rows sorted by group, one weight matrix per group (a mixture's experts).

Source of the form: megablocks (arXiv 2211.15841) and `jax.lax.ragged_dot`, with an offset for experts spread over
devices. "Groups" are the ragged batch's; the 32 inputs of an INT4 weight that share a scale are called by their number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Int4, Int32

from pallas_kernels import formats
from pallas_kernels.activations import Activation, find_activation
from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments, known
from pallas_kernels.dispatch import Backend, choose, differentiated_as, with_backward, with_gradient
from pallas_kernels.formats import Dense, Weight, as_weight
from pallas_kernels.formats.int4 import GROUP_SIZE, check_codes
from pallas_kernels.grouped_matmul import dequantized, mosaic_gradients, mosaic_int4, mosaic_tpu, triton, xla

Backends = tuple[Backend, ...]

_TRITON = Backend("triton", triton.grouped_matmul, ("cuda",), triton.unsupported)
# By format; those that have no entry are dequantised. (The last one also computes the gradient, save of dense weights.)
_DEQUANTIZED = Backend("xla", dequantized.grouped_matmul)
_MATMUL: dict[type[Weight], Backends] = {
    Dense: (
        Backend("mosaic_tpu", mosaic_tpu.grouped_matmul, ("tpu",), mosaic_tpu.unsupported),
        _TRITON,
        Backend("xla", xla.grouped_matmul),
    ),
    formats.Int4: (
        Backend("mosaic_tpu", mosaic_int4.grouped_matmul, ("tpu",), mosaic_int4.unsupported),
        _TRITON,
        _DEQUANTIZED,
    ),
    formats.Mxfp4: (
        Backend("mosaic_tpu", mosaic_int4.grouped_matmul, ("tpu",), mosaic_int4.unsupported),
        _DEQUANTIZED,
    ),
}

_GRADIENTS: Backends = (
    Backend("mosaic_tpu", mosaic_gradients.gradients, ("tpu",), mosaic_tpu.unsupported),
    Backend("xla", xla.gradients),
)


def _glu_backends(weight: type[Weight], activation: Callable[[Array, Array], Array]) -> Backends:
    def backend(name: str, run: Callable[..., Any], *rest: Any) -> Backend:
        return Backend(name, partial(run, activation=activation), *rest)

    on_gpus = backend("triton", triton.grouped_glu, ("cuda",), triton.unsupported)
    if weight is Dense:
        return (
            backend("mosaic_tpu", mosaic_tpu.grouped_glu, ("tpu",), mosaic_tpu.unsupported),
            on_gpus,
            backend("xla", xla.grouped_glu),
        )
    plain = backend("xla", dequantized.grouped_glu)
    if weight is formats.Int4:
        return backend("mosaic_tpu", mosaic_int4.grouped_glu, ("tpu",), mosaic_int4.unsupported), on_gpus, plain
    if weight is formats.Mxfp4:
        return backend("mosaic_tpu", mosaic_int4.grouped_glu, ("tpu",), mosaic_int4.unsupported), plain
    return (plain,)


@checks_arguments
def grouped_matmul(
    x: Float[Array, "T K"],
    weights: Weight | ArrayLike,
    group_sizes: Int32[Array, "groups"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Multiplies each row by its group's matrix: x Wᵀ with W [N, K] ([out, in], as Linears are published).

    Only the matrices of groups with rows are read.

    Args:
      x: [T, K], rows sorted by group.
      weights: [E, N, K], an array in x's dtype or a weight of any format.
      group_sizes: int32 [groups], rows of every group, also of those on other devices; their sum is at most T.
      group_offset: `weights` are those of groups [group_offset, group_offset + E); None says that they are all groups'.
      implementation: "mosaic_tpu" (x bf16 or float32; dense N and K multiples of 128; `Int4` and `Mxfp4` N a
        multiple of 128, K of 512 or at most 2048 and a multiple of 64), "triton" (x bf16 or float32; N a multiple of
        64, dense K too; not `Mxfp4`), "xla", or None for the best that the platform has.

    Returns:
      [T, N] in x's dtype, accumulated in float32. Rows of groups on other devices, and rows past the last group,
      are zero. Differentiable with respect to x and dense weights; the parts of quantised ones are constants.

    Raises:
      ValueError: shapes or dtypes other than these, groups that are not there, or (where the values are known) group
        sizes that are negative or exceed T.
    """
    return _multiply("grouped_matmul", x, weights, group_sizes, group_offset, implementation)


@checks_arguments
def grouped_glu(
    x: Float[Array, "T K"],
    gate: Weight | ArrayLike,
    up: Weight | ArrayLike,
    group_sizes: Int32[Array, "groups"],
    *,
    activation: Activation = "silu",
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """Computes a gated linear unit of each row with its group's matrices, silu(x gateᵀ) * (x upᵀ), in one pass.

    `gate` and `up` are each [E, N, K] and of one format. `activation` is a name of `activations.ACTIVATIONS` or a
    hashable function of (x gateᵀ, x upᵀ). The other arguments are those of `grouped_matmul`.
    """
    op = "grouped_glu"
    combine = find_activation(op, activation)
    check_dtype(op, "x", x, jnp.floating)
    gate, up = (check_weight(op, *named, jnp.result_type(x)) for named in (("gate", gate), ("up", up)))
    check_one_format(op, gate=gate, up=up)
    bind_shapes(op, x=(x, "T K"), gate=(gate, "E N K"), up=(up, "E N K"), group_sizes=(group_sizes, "groups"))
    offset = check_groups(op, x, group_sizes, group_offset, gate.shape[0])
    arguments = (jnp.asarray(x), gate, up, jnp.asarray(group_sizes), offset)
    backends = _glu_backends(type(gate), combine)
    run = choose(op, implementation, backends, *arguments)
    if isinstance(gate, Dense):
        return differentiated_as(run, partial(_two_products, op, implementation, combine))(*arguments)
    return with_gradient(run, backends[-1].run)(*arguments)


def _two_products(
    op: str, implementation: str | None, combine: Callable[..., Array], x: Array, gate: Dense, up: Dense, *groups: Any
) -> Array:
    """Computes the unit of dense weights as two grouped products, each of which has a gradient kernel.

    `groups` are sizes and offset; a constant may come as NumPy's.
    """
    return combine(*(_dense_product(op, implementation, x, weight, *groups) for weight in (gate, up)))


def _dense_product(op: str, implementation: str | None, *arguments: Any) -> Array:
    run = choose(op, implementation, _MATMUL[Dense], *arguments)
    # There is no gradient's kernel for GPUs
    gradients = choose(op, "xla" if implementation == "triton" else implementation, _GRADIENTS, *arguments)

    def backward(arrays: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
        return *gradients(*arrays, dy), *xla.no_gradient(*arrays[2:])

    return with_backward(run, backward)(*arguments)


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

    This is `grouped_matmul` with `formats.Int4(codes, scales)`: codes int4 [E, K, N], K a multiple of 32, and scales
    [E, K//32, N], bf16 as published. The other arguments, and what is returned and raised, are those of
    `grouped_matmul`.
    """
    op = "int4_grouped_matmul"
    check_dtype(op, "x", x, jnp.floating)
    groups = jnp.shape(x)[-1] // GROUP_SIZE
    bind_shapes(op, x=(x, "T K"), codes=(codes, "E K N"), scales=(scales, f"E {groups} N"))
    check_codes(op, codes, scales)
    return _multiply(op, x, formats.Int4(codes, scales), group_sizes, group_offset, implementation)


@checks_arguments
def _multiply(
    op: str,
    x: Float[Array, "T K"],
    weights: Weight | ArrayLike,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""] | int | None,
    implementation: str | None,
) -> Float[Array, "T N"]:
    check_dtype(op, "x", x, jnp.floating)
    weight = check_weight(op, "weights", weights, jnp.result_type(x))
    bind_shapes(op, x=(x, "T K"), weights=(weight, "E N K"), group_sizes=(group_sizes, "groups"))
    offset = check_groups(op, x, group_sizes, group_offset, weight.shape[0])
    arguments = (jnp.asarray(x), weight, jnp.asarray(group_sizes), offset)
    if isinstance(weight, Dense):
        return _dense_product(op, implementation, *arguments)
    backends = _MATMUL.get(type(weight), (_DEQUANTIZED,))
    return with_gradient(choose(op, implementation, backends, *arguments), backends[-1].run)(*arguments)


@checks_arguments
def check_weight(op: str, name: str, weight: Weight | ArrayLike, dtype: Any) -> Weight:
    """Returns the weight as the op multiplies x of `dtype` by it.

    Raises:
      ValueError: it is neither an array nor a weight, its parts do not fit, or a dense one is of another dtype.
    """
    operand = as_weight(op, name, weight).operand(dtype)
    operand.check(op, name)
    if isinstance(operand, Dense):
        check_dtype(op, name, operand.weight, dtype)
    return operand


def check_one_format(op: str, **weights: Weight) -> None:
    """Raises ValueError where the weights are not of one format."""
    found = [type(weight).__name__ for weight in weights.values()]
    if len(set(found)) > 1:
        *names, last = weights
        raise ValueError(f"{op}: {', '.join(names)} and {last} are {', '.join(found)}, expected one format")


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
