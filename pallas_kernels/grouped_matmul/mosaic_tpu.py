"""Grouped matmul and gated linear units as one Pallas kernel for TPUs, with matrices [E, N, K] as published.

(`jax.lax.ragged_dot` wants [E, K, N], for which XLA copies all experts' weights at every call.) The grid
is (N tiles, visits), the number of visits dynamic. A step takes all K inputs of a tile of the visit's matrix, up to 4
MiB, and multiplies the group's rows of the block by it, a window at a time. Rows of other groups in a window are
multiplied too but not written. A block of x stays in vector memory for all its visits; a matrix is read once per visit.

Windows of more than 64 rows spill: their product is larger than the register file. With 512 rows an expert, in windows
of 256, SwiGLU has 2,719 stores and loads on v5e and 3,891 on v6e. They fit beside the matrix unit's work (98 % of the
window's bundles on v5e), which smaller windows would add to: a matrix is loaded into the unit once per window.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.formats import Dense
from pallas_kernels.grouped_matmul.visits import WINDOWS, block_visits, window_size
from pallas_kernels.hardware import LANES, VMEM_LIMIT

BLOCK_BYTES, STEP_BYTES = 2**23, 2**22


def unsupported(x: Array, weight: Dense, *others: Any) -> str | None:
    """Says why the kernel cannot take these shapes and dtypes; None where it can."""
    N, K = weight.shape[1:]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if x.shape[0] == 0:
        return "x has no rows"
    if N % LANES or K % LANES:
        return f"weights are [{N}, {K}], expected multiples of {LANES}"
    return None


def grouped_matmul(
    x: Float[Array, "T K"],
    weight: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    *,
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`."""
    return _call(x, [weight.weight], group_sizes, group_offset, lambda y: y, name="grouped_matmul", interpret=interpret)


def rows_gradient(
    dy: Float[Array, "T N"],
    weight: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    *,
    interpret: Any = False,
) -> Float[Array, "T K"]:
    """Returns the gradient of x, dy W for each group's rows: the same kernel with the matrices' other axis summed."""
    groups, name = (group_sizes, group_offset), "grouped_rows_gradient"
    return _call(dy, [weight.weight], *groups, lambda y: y, name=name, interpret=interpret, summed=0)


def grouped_glu(
    x: Float[Array, "T K"],
    gate: Dense,
    up: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    *,
    activation: Callable[[Array, Array], Array],
    interpret: Any = False,
) -> Float[Array, "T N"]:
    """See `api.grouped_glu`."""
    weights = [gate.weight, up.weight]
    return _call(x, weights, group_sizes, group_offset, activation, name="grouped_glu", interpret=interpret)


def outputs_of_a_step(N: int, K: int, itemsize: int) -> int:
    """Returns the N tile: as many outputs as a step's bytes allow, a divisor of N."""
    return max(n for n in range(LANES, N + 1, LANES) if N % n == 0 and (n == LANES or n * K * itemsize <= STEP_BYTES))


def window_rows(tokens: int, groups: int) -> int:
    """Returns the rows of a window; more than 256 at once take the compiler minutes."""
    return min(window_size(tokens, groups), 256)


def _call(
    x: Float[Array, "T K"],
    weights: list[Float[Array, "E _ _"]],
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    combine: Callable[..., Array],
    *,
    name: str,
    interpret: Any,
    summed: int = 1,
) -> Float[Array, "T N"]:
    """Sums x's columns with axis `summed` of the last two of the weights: [E, N, K] for 1, [E, K, N] for 0."""
    tokens, (num_local, N, K) = x.shape[0], weights[0].shape
    if summed == 0:
        N, K = K, N
    rows = window_rows(tokens, num_local)
    most = max(rows, BLOCK_BYTES // (K * x.dtype.itemsize) // rows * rows)
    block = min(-(-tokens // rows) * rows, most, WINDOWS[-1])
    outputs = outputs_of_a_step(N, K, x.dtype.itemsize)
    blocks = -(-tokens // block)
    visit = block_visits(group_sizes, group_offset, num_local, blocks, block)
    weight = pl.BlockSpec((None, outputs, K), lambda n, v, block, group, *_: (group[v], n, 0))
    if summed == 0:
        weight = pl.BlockSpec((None, K, outputs), lambda n, v, block, group, *_: (group[v], 0, n))
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, combine=combine, summed=summed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(N // outputs, visit.total[0]),
            in_specs=[pl.BlockSpec((block, K), lambda n, v, block, *_: (block[v], 0)), *[weight] * len(weights)],
            out_specs=pl.BlockSpec((block, outputs), lambda n, v, block, *_: (block[v], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((blocks * block, N), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=name,
        interpret=interpret,
    )(*visit, jnp.pad(x, [(0, blocks * block - tokens), (0, 0)]), *weights)
    return out[:tokens]


def _kernel(
    block_ref: Any,
    group_ref: Any,
    count_ref: Any,
    start_ref: Any,
    end_ref: Any,
    x_ref: Any,
    *refs: Any,
    rows: int,
    combine: Callable[..., Array],
    summed: int,
) -> None:
    *weights, out_ref = refs
    v = pl.program_id(1)
    size = x_ref.shape[0]
    start, end = (jnp.clip(edge[group_ref[v]] - block_ref[v] * size, 0, size) for edge in (start_ref, end_ref))

    @pl.when((v == 0) | (block_ref[v] != block_ref[jnp.maximum(v - 1, 0)]))
    def _zero() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    def window(i: Array, _: None) -> None:
        first = pl.multiple_of(i * rows, rows)
        here = pl.ds(first, rows)
        number = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        fresh = combine(*(_dot(x_ref[here, :], weight[...], summed) for weight in weights))
        in_group = (number >= start) & (number < end)
        out_ref[here, :] = jnp.where(in_group, fresh, out_ref[here, :].astype(jnp.float32)).astype(out_ref.dtype)

    lax.fori_loop(start // rows, jnp.where(end > start, pl.cdiv(end, rows), start // rows), window, None)


def _dot(x: Array, weights: Array, summed: int) -> Array:
    """Sums x's columns with the weights' axis `summed`, in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((1,), (summed,)), ((), ()))
    return lax.dot_general(x, weights, axes, precision=precision, preferred_element_type=jnp.float32)
