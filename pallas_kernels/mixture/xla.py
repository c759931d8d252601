"""A mixture of experts in plain JAX: the grouped ops on rows sorted by expert, put back in order."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.grouped_matmul import xla as dense
from pallas_kernels.int4_grouped_matmul import xla as int4
from pallas_kernels.mixture.stages import ExpertMatrix


def mixture(
    x: Float[Array, "T K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    first: Any,  # int32 []; a constant may come as NumPy's
) -> Float32[Array, "T K"]:
    """See `api.mixture`."""
    choices, num_local = chosen.shape[1], (gate[0] if isinstance(gate, tuple) else gate).shape[0]
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < num_local), local, num_local)
    order = jnp.argsort(local)
    rows, sizes = x[order // choices], jnp.sum(local[:, None] == jnp.arange(num_local), axis=0, dtype=jnp.int32)
    no_offset = jnp.int32(0)
    if isinstance(gate, tuple) and isinstance(up, tuple) and isinstance(down, tuple):
        y = int4.int4_grouped_swiglu(rows, gate, up, sizes, no_offset)
        y = int4.int4_grouped_matmul(y, *down, sizes, no_offset)
    else:
        assert not isinstance(gate, tuple) and not isinstance(up, tuple) and not isinstance(down, tuple)
        y = dense.grouped_swiglu(rows, gate, up, sizes, no_offset)
        y = dense.grouped_matmul(y, down, sizes, no_offset)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return jnp.einsum(
        "tjd,tj->td", y[inverse].reshape(*chosen.shape, y.shape[-1]), weights, preferred_element_type=jnp.float32
    )
