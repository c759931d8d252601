"""Grouped matmul and gated linear units as one Pallas kernel for NVIDIA GPUs, which Triton compiles.

The grid is (output tiles, visits): a program multiplies up to 128 rows of one group by a tile of its matrix, its inputs
in turns, whose loads Triton issues some turns ahead. Only matrices of groups with rows are read, from where they are;
INT4 codes become numbers in registers. A visit's rows may be anywhere in x, and its results go anywhere, so that a
mixture copies no rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.formats import Weight
from pallas_kernels.grouped_matmul.blocks import local_groups
from pallas_kernels.grouped_matmul.triton_tiles import OUTPUTS, TILES
from pallas_kernels.grouped_matmul.triton_visits import GroupVisits, group_visits, rows_of_a_visit


def unsupported(x: Array, weight: Weight, *others: Any) -> str | None:
    """Says why the kernel cannot take these shapes, dtypes and formats; None where it can."""
    if type(weight) not in TILES:
        return f"weights are {type(weight).__name__}, expected {' or '.join(form.__name__ for form in TILES)}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if x.shape[0] == 0:
        return "x has no rows"
    return TILES[type(weight)].unsupported(weight)


def grouped_matmul(
    x: Float[Array, "T K"],
    weight: Weight,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`."""
    return _grouped(x, [weight], group_sizes, group_offset, lambda y: y, "grouped_matmul", interpret)


def grouped_glu(
    x: Float[Array, "T K"],
    gate: Weight,
    up: Weight,
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    *,
    activation: Callable[[Array, Array], Array],
    interpret: bool = False,
) -> Float[Array, "T N"]:
    """See `api.grouped_glu`."""
    return _grouped(x, [gate, up], group_sizes, group_offset, activation, "grouped_glu", interpret)


def _grouped(
    x: Float[Array, "T K"],
    weights: list[Weight],
    group_sizes: Int32[Array, "groups"],
    group_offset: Int[Array, ""],
    combine: Callable[..., Array],
    name: str,
    interpret: bool,
) -> Float[Array, "T N"]:
    tokens, num_local = x.shape[0], weights[0].shape[0]
    starts, ends = local_groups(group_sizes, group_offset, num_local)
    rows = rows_of_a_visit(tokens, -(-tokens // num_local))
    visits = group_visits(starts, ends, tokens, rows)
    number = jnp.arange(tokens, dtype=jnp.int32)
    places = (number, number, jnp.ones(tokens, jnp.float32))
    y = multiply_visits(
        x, weights, visits, *places, rows=rows, combine=combine, dtype=x.dtype, name=name, interpret=interpret
    )
    # No program writes rows of other groups
    return jnp.where(((number >= starts[0]) & (number < ends[-1]))[:, None], y, 0)


def multiply_visits(
    x: Float[Array, "_ K"],
    weights: list[Weight],
    visits: GroupVisits,
    source: Int32[Array, "places"],
    target: Int32[Array, "places"],
    share: Float32[Array, "places"],
    *,
    rows: int,
    combine: Callable[..., Array],
    dtype: Any,
    name: str,
    interpret: bool,
) -> Float[Array, "places N"]:
    """Computes share[i] * combine(x[source[i]] times each matrix of place i's group), and writes it to row target[i].

    `visits` list the places of each group, up to `rows` at a time. Rows that none of them writes may hold anything.
    """
    N = weights[0].shape[1]
    tile = TILES[type(weights[0])].choose(weights[0], rows)
    return pl.pallas_call(
        partial(_multiply, tile=tile, rows=rows, combine=combine),
        grid=(N // OUTPUTS, visits.group.shape[0]),
        in_specs=[pl.no_block_spec] * 7 + [spec for weight in weights for spec in tile.specs(weight)],
        out_shape=jax.ShapeDtypeStruct((target.shape[0], N), dtype),
        # Two groups of four warps, which multiply 64 rows each
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows > 64 else 4, num_stages=4),
        name=name,
        interpret=interpret,
    )(*visits, source, target, share, x, *jax.tree.leaves(weights))


def _multiply(
    group_ref: Any,
    first_ref: Any,
    count_ref: Any,
    source_ref: Any,
    target_ref: Any,
    share_ref: Any,
    x_ref: Any,
    *refs: Any,
    tile: Any,
    rows: int,
    combine: Callable[..., Array],
) -> None:
    *arrays, out_ref = refs
    matrices = [arrays[i : i + tile.arrays] for i in range(0, len(arrays), tile.arrays)]
    n, v = pl.program_id(0), pl.program_id(1)
    group, count = group_ref[v], count_ref[v]
    number = jnp.arange(rows, dtype=jnp.int32)
    is_row = number < count
    place = jnp.where(is_row, first_ref[v] + number, 0)
    source, share = (plgpu.load(ref.at[place], mask=is_row, other=0) for ref in (source_ref, share_ref))
    # Past the end where there is no row: the interpreter writes there too
    target = plgpu.load(target_ref.at[place], mask=is_row, other=out_ref.shape[0])
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
    multiply = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    def turn(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        inputs = k * tile.inputs + jnp.arange(tile.inputs, dtype=jnp.int32)
        left = plgpu.load(x_ref.at[source[:, None], inputs[None, :]], mask=is_row[:, None], other=0)
        right = (tile.load(matrix, group, k, x_ref.dtype) for matrix in matrices)
        return tuple(total + multiply(left, matrix) for total, matrix in zip(totals, right, strict=True))

    zeros = tuple(jnp.zeros((rows, OUTPUTS), jnp.float32) for _ in matrices)
    # A visit without rows takes no turn
    turns = jnp.minimum(count, 1) * (x_ref.shape[1] // tile.inputs)
    y = share[:, None] * combine(*lax.fori_loop(0, turns, turn, zeros))
    outputs = n * OUTPUTS + jnp.arange(OUTPUTS, dtype=jnp.int32)
    plgpu.store(out_ref.at[target[:, None], outputs[None, :]], y.astype(out_ref.dtype), mask=is_row[:, None])
