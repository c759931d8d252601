"""Grouped matmul with weights of any format in plain JAX: a loop over the groups that dequantises one matrix at a time.

Every platform runs this loop, since nothing else keeps the weights in their format. Their parts are constants.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.formats import Weight
from pallas_kernels.grouped_matmul.blocks import dot, local_groups, map_rows
from pallas_kernels.grouped_matmul.xla import no_gradient


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "T K"],
    weight: Weight,
    group_sizes: Int32[Array, "all"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
) -> Float[Array, "T N"]:
    """See `api.grouped_matmul`."""
    num_local, N, _ = weight.shape
    edges = local_groups(group_sizes, group_offset, num_local)
    return map_rows(x, N, edges, lambda group: _load(weight, group, x.dtype), dot)


def _forward(x, weight, group_sizes, group_offset):
    saved = (weight, group_sizes, group_offset)
    return grouped_matmul(x, *saved), saved


def _backward(saved, dy):
    weight, group_sizes, group_offset = saved
    num_local, _, K = weight.shape
    edges = local_groups(group_sizes, group_offset, num_local)
    dx = map_rows(dy, K, edges, lambda group: _load(weight, group, dy.dtype).T, dot)
    return dx, *_no_gradients(*saved)


grouped_matmul.defvjp(_forward, _backward)


def grouped_glu(
    x: Float[Array, "T K"],
    gate: Weight,
    up: Weight,
    group_sizes: Int32[Array, "all"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
    *,
    activation: Callable[[Array, Array], Array],
) -> Float[Array, "T N"]:
    """See `api.grouped_glu`."""
    return _grouped_glu(activation, x, gate, up, group_sizes, group_offset)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_glu(activation, x, gate, up, group_sizes, group_offset):
    num_local, N, _ = gate.shape
    edges = local_groups(group_sizes, group_offset, num_local)
    return map_rows(
        x,
        N,
        edges,
        lambda group: (_load(gate, group, x.dtype), _load(up, group, x.dtype)),
        lambda rows, matrices: activation(dot(rows, matrices[0]), dot(rows, matrices[1])),
    )


def _glu_forward(activation, x, gate, up, group_sizes, group_offset):
    saved = (x, gate, up, group_sizes, group_offset)
    return _grouped_glu(activation, *saved), saved


def _glu_backward(activation, saved, dy):
    x, *constants = saved
    gate, up, group_sizes, group_offset = constants

    def product_of_two(x: Array) -> Array:
        return activation(*(grouped_matmul(x, weight, group_sizes, group_offset) for weight in (gate, up)))

    (dx,) = jax.vjp(product_of_two, x)[1](dy)
    return dx, *_no_gradients(*constants)


_grouped_glu.defvjp(_glu_forward, _glu_backward)


def _load(weight: Weight, group: Array, dtype: Any) -> Float[Array, "K N"]:
    # Without the barrier XLA may dequantise anew for every block of rows.
    return lax.optimization_barrier(weight.at(group).dequantize(dtype).T)


def _no_gradients(*constants: Any) -> tuple[Any, ...]:
    """Returns the cotangents that `custom_vjp` wants for constants, floating or not."""

    def zeros(array: Array) -> Any:
        floating = jnp.issubdtype(jnp.result_type(array), jnp.floating)
        return jnp.zeros_like(array) if floating else no_gradient(array)[0]

    return tuple(jax.tree.map(zeros, constant) for constant in constants)
