"""The visits of a decode step's experts, as one Pallas kernel for TPUs.

Tokens are along the sublanes and local experts along the lanes. A token chooses an expert at most once, so that the
pairs of a token and an expert are a matrix of zeros and ones; the sums over it that number pairs and visits are
products with triangles of ones, exact in bf16 and float32. An expert's pairs are then moved to the lanes of its row of
the list, which is as wide as a register.

XLA makes a sort and eight operations of it, each of which takes longer to begin than to compute.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Int32

from pallas_kernels.hardware import LANES
from pallas_kernels.mixture.visits import ExpertVisits

# Tokens whose choices fill whole registers, in bf16 too.
ROWS = 16


def serves(tokens: int, num_local: int, rows: int, cores: int) -> bool:
    """Tells whether the kernel lists visits of so many experts: an expert's tokens have to fit one visit of `rows`."""
    return tokens <= min(rows, LANES) and num_local + cores <= LANES


def expert_visits(
    chosen: Int32[Array, "T J"], first: Int[Array, ""] | int, num_local: int, cores: int, interpret: Any = False
) -> tuple[ExpertVisits, Int32[Array, ""]]:
    """Lists visits as `visits.expert_visits` does, one of each expert that some token chose."""
    tokens = chosen.shape[0]
    chosen = jnp.pad(chosen, ((0, -tokens % ROWS), (0, 0)), constant_values=-1)
    first = jnp.asarray(first, jnp.int32).reshape(1)
    lists = [jax.ShapeDtypeStruct((LANES,), jnp.int32)] * 4
    vector, scalar = (pl.BlockSpec(memory_space=memory) for memory in (pltpu.VMEM, pltpu.SMEM))
    *visits, per_core = pl.pallas_call(
        partial(_visits_kernel, num_local=num_local, cores=cores),
        in_specs=[scalar, vector],
        out_specs=[*[vector] * 5, scalar],
        out_shape=[
            *lists,
            jax.ShapeDtypeStruct((num_local * LANES,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        name="expert_visits",
        interpret=interpret,
    )(first, chosen)
    return ExpertVisits(*visits), per_core[0]


def _visits_kernel(
    first_ref: Any,
    chosen_ref: Any,
    expert_ref: Any,
    visit_ref: Any,
    start_ref: Any,
    end_ref: Any,
    pair_ref: Any,
    per_core_ref: Any,
    *,
    num_local: int,
    cores: int,
) -> None:
    tokens, choices = chosen_ref.shape
    token, expert = (lax.broadcasted_iota(jnp.int32, (tokens, LANES), axis) for axis in (0, 1))
    local = chosen_ref[...] - first_ref[0]
    pair = jnp.full((tokens, LANES), -1, jnp.int32)  # of a token and an expert; -1 where there is none
    for choice in range(choices):
        found = (local[:, choice : choice + 1] == expert) & (expert < num_local)
        pair = jnp.where(found, token * choices + choice, pair)
    is_pair = jnp.where(pair >= 0, 1.0, 0.0)
    place = jnp.where(pair >= 0, _dot(_triangle(tokens, lambda row, column: column < row), is_pair, 0), -1.0)
    for number in range(num_local):
        of_expert = slice(number, number + 1)
        at_place = place[:, of_expert].astype(jnp.int32) == expert
        row = jnp.sum(jnp.where(at_place, pair[:, of_expert], 0), axis=0)
        pair_ref[number * LANES : (number + 1) * LANES] = row
    # Row e and column e of a square are an expert's; what is along the rows is in all columns.
    row, column = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    is_visited = jnp.where(_dot(is_pair, jnp.ones_like(is_pair), 1) > 0, 1.0, 0.0)
    up_to = _dot(_triangle(LANES, lambda row, column: column <= row), is_visited, 0).astype(jnp.int32)
    visited = jnp.sum(is_visited, axis=0).astype(jnp.int32)
    expert_ref[...] = jnp.sum(jnp.where((row < num_local) & (up_to <= column), 1, 0), axis=0)
    visit_ref[...] = jnp.sum(jnp.where(row < column, is_visited, 0.0), axis=0).astype(jnp.int32)
    start = column[0] * LANES
    start_ref[...] = start
    end_ref[...] = start + jnp.sum(is_pair, axis=0).astype(jnp.int32)
    per_core_ref[0] = jnp.maximum((jnp.max(visited) + (cores - 1)) // cores, 1)


def _triangle(size: int, holds: Any) -> Array:
    """Returns the square of ones where `holds` of the row's and the column's number, and zeros."""
    return jnp.where(holds(*(lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))), 1.0, 0.0)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Multiplies zeros and ones, contracting the last axis of a, or both first ones with `axis` 1."""
    contracted = ((0,), (0,)) if axis else ((1,), (0,))
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)
