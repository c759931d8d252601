"""A mixture of experts in plain JAX: rows sorted by expert, the grouped ops, and back."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_matmul import xla as dense
from pallas_kernels.int4_grouped_matmul import xla as int4
from pallas_kernels.mixture.stages import Weight


def mixture(
    x: Float[Array, "T K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Weight,
    up: Weight,
    down: Weight,
    first: Any,  # int32 []; a constant may come as NumPy's
) -> Float32[Array, "T K"]:
    """See `api.mixture`."""
    choices, held = chosen.shape[1], (gate[0] if isinstance(gate, tuple) else gate).shape[0]
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < held), local, held)
    order = jnp.argsort(local)
    rows, sizes = x[order // choices], jnp.sum(local[:, None] == jnp.arange(held), axis=0, dtype=jnp.int32)
    all_here = jnp.int32(0)
    if isinstance(gate, tuple) and isinstance(up, tuple) and isinstance(down, tuple):
        y = int4.int4_grouped_swiglu(rows, gate, up, sizes, all_here)
        y = int4.int4_grouped_matmul(y, *down, sizes, all_here)
    else:
        assert not isinstance(gate, tuple) and not isinstance(up, tuple) and not isinstance(down, tuple)
        y = dense.grouped_swiglu(rows, gate, up, sizes, all_here)
        y = dense.grouped_matmul(y, down, sizes, all_here)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return jnp.einsum(
        "tjd,tj->td", y[back].reshape(*chosen.shape, y.shape[-1]), weights, preferred_element_type=jnp.float32
    )
