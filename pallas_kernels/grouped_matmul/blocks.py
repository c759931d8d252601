"""Loops over the rows of a ragged batch group by group, without Pallas and without work that no row asks for.

Rows are sorted by group. An outer loop visits the non-empty groups, an inner one cuts a group's rows in blocks that
never straddle a group, so that a group's weights are fetched (and dequantised) once. Both loops have dynamic bounds:
the work is proportional to the number of rows.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

# Up to so many rows in all, or on average for each group, are multiplied one by one. A block copies a group's weights
# before it multiplies, which takes as long as seven single rows (48M-parameter toy, two cores).
FEW_ROWS, FEW_ROWS_EACH = 16, 4
# Larger blocks multiply faster, smaller ones waste less on a group's last rows.
BLOCK_SIZES = (128, 64, 16)

Carry = TypeVar("Carry")
Weights = TypeVar("Weights")


def local_groups(
    group_sizes: Int32[Array, "groups"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
    num_local: int,
) -> tuple[Int32[Array, "local"], Int32[Array, "local"]]:
    """Returns the first row and the end of each of the `num_local` groups from number `group_offset` on."""
    number = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)
    local = group_offset + jnp.arange(num_local, dtype=jnp.int32)[:, None]
    # (jnp.cumsum would be a dozen small operations on a TPU)
    starts = jnp.sum(jnp.where(number < local, group_sizes, 0), axis=1, dtype=jnp.int32)
    ends = jnp.sum(jnp.where(number <= local, group_sizes, 0), axis=1, dtype=jnp.int32)
    return starts, ends


def over_groups(
    starts: Int32[Array, "local"],
    ends: Int32[Array, "local"],
    carry: Carry,
    visit: Callable[[Array, Array, Array, Carry], Carry],
) -> Carry:
    """Runs carry = visit(group, start, end, carry) for each group with rows, in order, and returns the last carry."""
    up_to = jnp.cumsum(ends > starts, dtype=jnp.int32)

    def step(i: Array, carry: Carry) -> Carry:
        group = jnp.sum(up_to <= i, dtype=jnp.int32)  # (jnp.nonzero would scatter)
        return visit(group, starts[group], ends[group], carry)

    return lax.fori_loop(0, up_to[-1], step, carry)


def over_rows(
    start: Array, end: Array, num_rows: int, carry: Carry, visit: Callable[[Array, Bool[Array, "block"], Carry], Carry]
) -> Carry:
    """Runs carry = visit(first row, mask, carry) over blocks of rows that cover [start, end) once.

    A block has as many rows as its mask, which says which of them count. Blocks stay inside [0, num_rows): one that
    would run over the end begins earlier instead.
    """
    sizes = _block_sizes(num_rows)
    for size in sizes:
        blocks = (end - start) // size if size != sizes[-1] else -((start - end) // size)

        def step(i: Array, carry: Carry, size: int = size, start: Array = start) -> Carry:
            wanted = start + i * size
            first = jnp.minimum(wanted, num_rows - size)
            rows = first + jnp.arange(size, dtype=jnp.int32)
            return visit(first, (rows >= wanted) & (rows < end), carry)

        carry = lax.fori_loop(0, blocks, step, carry)
        start = start + blocks * size
    return carry


def map_rows(
    x: Float[Array, "T K"],
    out_width: int,
    group_edges: tuple[Int32[Array, "local"], Int32[Array, "local"]],
    load: Callable[[Array], Weights],
    compute: Callable[[Float[Array, "block K"], Weights], Float[Array, "block N"]],
) -> Float[Array, "T N"]:
    """Computes `compute(rows, load(group))` for the rows of each group, in x's dtype; rows of no group are zero."""
    starts, ends = group_edges
    num_rows = x.shape[0]
    out = jnp.zeros((num_rows, out_width), x.dtype)
    if num_rows <= max(FEW_ROWS, FEW_ROWS_EACH * starts.shape[0]):
        return _row_by_row(x, out, group_edges, lambda row, group: compute(row, load(group))) if num_rows else out

    def group(index: Array, start: Array, end: Array, out: Array) -> Array:
        weights = load(index)

        def block(first: Array, counts: Array, out: Array) -> Array:
            size = counts.shape[0]
            fresh = compute(lax.dynamic_slice_in_dim(x, first, size), weights).astype(x.dtype)
            kept = lax.dynamic_slice_in_dim(out, first, size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(counts[:, None], fresh, kept), first, 0)

        return over_rows(start, end, num_rows, out, block)

    return over_groups(starts, ends, out, group)


def _row_by_row(
    x: Float[Array, "T K"],
    out: Float[Array, "T N"],
    group_edges: tuple[Int32[Array, "local"], Int32[Array, "local"]],
    compute: Callable[[Float[Array, "1 K"], Array], Float[Array, "1 N"]],
) -> Float[Array, "T N"]:
    """Multiplies rows one by one, each by its own group's weights in one fused loop."""
    starts, ends = group_edges
    groups = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=jnp.int32), side="right").astype(jnp.int32)

    def row(i: Array, out: Array) -> Array:
        fresh = compute(lax.dynamic_slice_in_dim(x, i, 1), groups[i])
        return lax.dynamic_update_slice_in_dim(out, fresh.astype(x.dtype), i, 0)

    return lax.fori_loop(starts[0], ends[-1], row, out)


def take(weights: Array, group: Array) -> Array:
    """Takes one group's slice of the leading axis. (Arithmetic on the index would keep XLA from fusing the slice.)"""
    return lax.dynamic_index_in_dim(weights, group, axis=0, keepdims=False, allow_negative_indices=False)


def dot(rows: Float[Array, "block K"], weights: Float[Array, "K N"]) -> Float[Array, "block N"]:
    """Multiplies with float32 accumulation (float64 of float64), exact to the operands' dtype on every platform."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.dot(rows, weights, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def dot_transposed(rows: Float[Array, "block K"], weights: Float[Array, "N K"]) -> Float[Array, "block N"]:
    """Computes `dot(rows, weights.T)`, written for XLA on CPU.

    With a transpose XLA fuses one row's product with the slice that takes the weights, but copies the weights of larger
    blocks.
    """
    if rows.shape[0] == 1:
        return dot(rows, weights.T)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    contract_last = (((1,), (1,)), ((), ()))
    return lax.dot_general(rows, weights, contract_last, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def _block_sizes(num_rows: int) -> tuple[int, ...]:
    return tuple(size for size in BLOCK_SIZES if size <= num_rows) or (num_rows,)
