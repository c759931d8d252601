"""Gradients of the dense grouped matmul as Pallas kernels for TPUs, neither of which scatters.

With y = x Wᵀ for the rows of a group, dx = dy W is a grouped matmul by the same matrices [N, K], read as they lie
(`mosaic_tpu`); and dW = dyᵀ x, summed over the group's rows. For the latter the grid is (N tiles, K tiles, visits), a
visit being a group and a block of rows with some of its own, group by group: a tile of dW stays in vector memory, in
float32, for all visits of its group, and is written once, zeros for a group without rows. Rows of other groups enter as
zeros. The order of a group's sum is that of its rows, so that the result does not depend on other groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.formats import Dense
from pallas_kernels.grouped_matmul import mosaic_tpu
from pallas_kernels.grouped_matmul.visits import group_visits
from pallas_kernels.hardware import LANES, VMEM_LIMIT

# Rows of a block and the most of a tile's sides: with 1024 x 1024 a row is read for as many products as a v6e computes
# meanwhile, and the float32 tile takes 4 MiB.
BLOCK_ROWS, MOST_SIDE = 512, 1024


def gradients(
    x: Float[Array, "T K"],
    weight: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    dy: Float[Array, "T N"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "T K"], Dense]:
    """Returns the gradients of x and the weights, each in its dtype; products are accumulated in float32.

    Rows of no group have a gradient of zero, and so have the matrices of groups without rows.
    """
    dx = mosaic_tpu.rows_gradient(dy, weight, group_sizes, group_offset, interpret=interpret)
    return dx, Dense(weights_gradient(x, weight, group_sizes, group_offset, dy, interpret=interpret))


def tile_side(width: int) -> int:
    """Returns a tile's side: the largest divisor of the width, in multiples of 128, up to MOST_SIDE."""
    return max(side for side in range(LANES, min(width, MOST_SIDE) + 1, LANES) if width % side == 0)


def weights_gradient(
    x: Float[Array, "T K"],
    weight: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    dy: Float[Array, "T N"],
    *,
    interpret: Any,
) -> Float[Array, "E N K"]:
    """Returns dyᵀ x over the rows of each group."""
    tokens, (num_local, N, K) = x.shape[0], weight.shape
    rows = mosaic_tpu.window_rows(tokens, num_local)
    block = min(-(-tokens // rows) * rows, BLOCK_ROWS)
    blocks = -(-tokens // block)
    visit = group_visits(group_sizes, group_offset, num_local, blocks, block)
    sides = tile_side(N), tile_side(K)
    padding = [(0, blocks * block - tokens), (0, 0)]
    return pl.pallas_call(
        functools.partial(_kernel, rows=rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(N // sides[0], K // sides[1], visit.total[0]),
            in_specs=[
                pl.BlockSpec((block, sides[0]), lambda n, k, v, block, *_: (block[v], n)),
                pl.BlockSpec((block, sides[1]), lambda n, k, v, block, *_: (block[v], k)),
            ],
            out_specs=pl.BlockSpec((None, *sides), lambda n, k, v, block, group, *_: (group[v], n, k)),
            scratch_shapes=[pltpu.VMEM(sides, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(weight.shape, weight.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="grouped_weights_gradient",
        interpret=interpret,
    )(*visit, jnp.pad(dy, padding), jnp.pad(x, padding))


def _kernel(
    block_ref: Any,
    group_ref: Any,
    count_ref: Any,
    start_ref: Any,
    end_ref: Any,
    dy_ref: Any,
    x_ref: Any,
    out_ref: Any,
    total_ref: Any,
    *,
    rows: int,
) -> None:
    v = pl.program_id(2)
    size, group = x_ref.shape[0], group_ref[v]
    start, end = (jnp.clip(edge[group] - block_ref[v] * size, 0, size) for edge in (start_ref, end_ref))
    last_visit = v == count_ref[0] - 1

    @pl.when((v == 0) | (group != group_ref[jnp.maximum(v - 1, 0)]))
    def _zero() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    def window(i: Array, _: None) -> None:
        first = pl.multiple_of(i * rows, rows)
        number = first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        in_group = (number >= start) & (number < end)
        dy, x = (jnp.where(in_group, ref[pl.ds(first, rows), :], 0) for ref in (dy_ref, x_ref))
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
        contract_rows = (((0,), (0,)), ((), ()))
        total_ref[...] += lax.dot_general(dy, x, contract_rows, precision=precision, preferred_element_type=jnp.float32)

    lax.fori_loop(start // rows, jnp.where(end > start, pl.cdiv(end, rows), start // rows), window, None)

    @pl.when(last_visit | (group != group_ref[jnp.where(last_visit, v, v + 1)]))
    def _write() -> None:
        out_ref[...] = total_ref[...].astype(out_ref.dtype)
