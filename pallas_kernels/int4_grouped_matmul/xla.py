"""Grouped matmul with INT4 weights in plain JAX: `grouped_matmul`'s loop, which dequantises one group's matrix at a
time.

Every platform runs this loop, since nothing else keeps the weights at half a byte.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int4, Int32

from pallas_kernels.formats.int4 import dequantize_int4
from pallas_kernels.grouped_matmul.blocks import dot, local_groups, map_rows, swiglu, take
from pallas_kernels.grouped_matmul.xla import no_gradient


@jax.custom_vjp
def int4_grouped_matmul(
    x: Float[Array, "T K"],
    codes: Int4[Array, "E K N"],
    scales: Float[Array, "E groups N"],
    group_sizes: Int32[Array, "all"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
) -> Float[Array, "T N"]:
    """See `api.int4_grouped_matmul`."""
    edges = local_groups(group_sizes, group_offset, codes.shape[0])
    return map_rows(x, codes.shape[2], edges, lambda group: _load(codes, scales, group, x.dtype), dot)


def _forward(x, codes, scales, group_sizes, group_offset):
    saved = (codes, scales, group_sizes, group_offset)
    return int4_grouped_matmul(x, *saved), saved


def _backward(saved, dy):
    codes, scales, group_sizes, group_offset = saved
    edges = local_groups(group_sizes, group_offset, codes.shape[0])
    dx = map_rows(dy, codes.shape[1], edges, lambda group: _load(codes, scales, group, dy.dtype).T, dot)
    return dx, *no_gradient(codes), jnp.zeros_like(scales), *no_gradient(group_sizes, group_offset)


int4_grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def int4_grouped_swiglu(
    x: Float[Array, "T K"],
    gate: tuple[Int4[Array, "E K N"], Float[Array, "E groups N"]],
    up: tuple[Int4[Array, "E K N"], Float[Array, "E groups N"]],
    group_sizes: Int32[Array, "all"],
    group_offset: Any,  # int32 []; a constant may come as NumPy's
) -> Float[Array, "T N"]:
    """See `api.int4_grouped_swiglu`."""
    edges = local_groups(group_sizes, group_offset, gate[0].shape[0])
    return map_rows(
        x,
        gate[0].shape[2],
        edges,
        lambda group: (_load(*gate, group, x.dtype), _load(*up, group, x.dtype)),
        lambda rows, weights: swiglu(dot(rows, weights[0]), dot(rows, weights[1])),
    )


def _swiglu_forward(x, gate, up, group_sizes, group_offset):
    return int4_grouped_swiglu(x, gate, up, group_sizes, group_offset), (x, gate, up, group_sizes, group_offset)


def _swiglu_backward(saved, dy):
    x, gate, up, group_sizes, group_offset = saved

    def product_of_two(x: Array) -> Array:
        return swiglu(*(int4_grouped_matmul(x, *weights, group_sizes, group_offset) for weights in (gate, up)))

    (dx,) = jax.vjp(product_of_two, x)[1](dy)
    constants = tuple((*no_gradient(codes), jnp.zeros_like(scales)) for codes, scales in (gate, up))
    return dx, *constants, *no_gradient(group_sizes, group_offset)


int4_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _load(
    codes: Int4[Array, "E K N"], scales: Float[Array, "E groups N"], group: Array, dtype: jnp.dtype
) -> Float[Array, "K N"]:
    # Without the barrier XLA may dequantise anew for every block of rows.
    return lax.optimization_barrier(dequantize_int4(take(codes, group), take(scales, group), dtype))
