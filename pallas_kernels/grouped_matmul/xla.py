"""Grouped matmul in plain JAX: a loop over the groups that have rows on CPU, `jax.lax.ragged_dot` elsewhere.

On CPU `ragged_dot` multiplies every row with every group. The loop's gradients are written out, since JAX cannot
differentiate a loop with dynamic bounds: dx is a grouped matmul with the transposed weights, dW sums dyᵀ x over each
group's rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int32

from pallas_kernels.formats import Dense
from pallas_kernels.grouped_matmul.blocks import (
    dot,
    dot_transposed,
    local_groups,
    map_rows,
    over_groups,
    over_rows,
    take,
)

Edges = tuple[Int32[Array, "local"], Int32[Array, "local"]]


def grouped_matmul(
    x: Float[Array, "T K"],
    weight: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`."""
    arrays = (x, weight.weight, group_sizes, group_offset)
    return lax.platform_dependent(*arrays, cpu=_loop, default=_ragged)


def gradients(
    x: Float[Array, "T K"],
    weight: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
    dy: Float[Array, "T N"],
) -> tuple[Float[Array, "T K"], Dense]:
    """Returns the gradients of x and the weights, each in its dtype."""
    arrays = (x, weight.weight, group_sizes, group_offset, dy)
    dx, dweights = lax.platform_dependent(*arrays, cpu=_loop_vjp, default=_ragged_vjp)
    return dx, Dense(dweights)


def grouped_glu(
    x: Float[Array, "T K"],
    gate: Dense,
    up: Dense,
    group_sizes: Int32[Array, "groups"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
    *,
    activation: Callable[[Array, Array], Array],
) -> Float[Array, "T N"]:
    """See `api.grouped_glu`."""
    arrays = (x, gate.weight, up.weight, group_sizes, group_offset)
    loop, two_products = partial(_loop_glu, activation), partial(_ragged_glu, activation)
    return lax.platform_dependent(*arrays, cpu=loop, default=two_products)


def no_gradient(*integers: ArrayLike) -> tuple[np.ndarray, ...]:
    """Returns the cotangents that `custom_vjp` wants for integer arguments."""
    return tuple(np.zeros(jnp.shape(array), jax.dtypes.float0) for array in integers)


def _loop(x, weights, group_sizes, group_offset):
    edges = local_groups(group_sizes, group_offset, weights.shape[0])
    return map_rows(x, weights.shape[1], edges, lambda group: take(weights, group), dot_transposed)


def _loop_glu(activation, x, gate, up, group_sizes, group_offset):
    edges = local_groups(group_sizes, group_offset, gate.shape[0])
    return map_rows(
        x,
        gate.shape[1],
        edges,
        lambda group: (take(gate, group), take(up, group)),
        lambda rows, weights: activation(dot_transposed(rows, weights[0]), dot_transposed(rows, weights[1])),
    )


def _ragged_glu(activation, x, gate, up, group_sizes, group_offset):
    return activation(*(_ragged(x, weights, group_sizes, group_offset) for weights in (gate, up)))


def _loop_vjp(x, weights, group_sizes, group_offset, dy):
    edges = local_groups(group_sizes, group_offset, weights.shape[0])
    dx = map_rows(dy, weights.shape[2], edges, lambda group: take(weights, group), dot)
    return dx, _outer_products(dy, x, edges, weights)


def _outer_products(
    dy: Float[Array, "T N"], x: Float[Array, "T K"], edges: Edges, weights: Float[Array, "E N K"]
) -> Float[Array, "E N K"]:
    """Computes dyᵀ x over the rows of each group, summed in float32."""

    def group(index: Array, start: Array, end: Array, total: Array) -> Array:
        def block(first: Array, counts: Array, total: Array) -> Array:
            left = jnp.where(counts[:, None], lax.dynamic_slice_in_dim(dy, first, counts.shape[0]), 0)
            right = jnp.where(counts[:, None], lax.dynamic_slice_in_dim(x, first, counts.shape[0]), 0)
            return total + dot(left.T, right)

        wide = jnp.promote_types(x.dtype, jnp.float32)
        summed = over_rows(start, end, x.shape[0], jnp.zeros(weights.shape[1:], wide), block)
        return lax.dynamic_update_index_in_dim(total, summed.astype(weights.dtype), index, 0)

    zeros = jnp.zeros_like(weights)
    return over_groups(*edges, zeros, group) if x.shape[0] else zeros


def _ragged(x, weights, group_sizes, group_offset):
    starts, ends = local_groups(group_sizes, group_offset, weights.shape[0])
    # bf16 products are exact at any precision, and the TPU's compiler refuses them at a higher one.
    precision = lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    # ragged_dot has no offset: bring the first local row to the top, and back afterwards.
    product = lax.ragged_dot(
        jnp.roll(x, -starts[0], axis=0),
        jnp.swapaxes(weights, 1, 2),
        ends - starts,
        precision=precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    rows = jnp.arange(x.shape[0])
    is_local = (rows >= starts[0]) & (rows < ends[-1])
    return jnp.where(is_local[:, None], jnp.roll(product, starts[0], axis=0), 0).astype(x.dtype)


def _ragged_vjp(x, weights, group_sizes, group_offset, dy):
    _, pull = jax.vjp(lambda x, weights: _ragged(x, weights, group_sizes, group_offset), x, weights)
    return pull(dy)
