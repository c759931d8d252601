"""A mixture of experts for NVIDIA GPUs: two grouped kernels, between which the activation's values are in memory.

Pairs of a token and one of its experts are sorted by expert, as numbers; the kernels read each pair's token where it is
and write its result, rounded to the tokens' dtype, at its place, so that no rows are sorted. A token's results are then
added up in float32. The experts that some token chose are read once for up to 128 of their rows, and others not at all.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.formats import Weight
from pallas_kernels.grouped_matmul import triton as grouped
from pallas_kernels.grouped_matmul.triton_visits import group_visits, rows_of_a_visit

# The most pairs whose results exist at one time: those of 2,048 tokens in Kimi's models.
BLOCK = 16384


def unsupported(
    x: Array, chosen: Array, weights: Array, gate: Weight, up: Weight, down: Weight, first: Array
) -> str | None:
    """Says why the kernels cannot take these shapes, dtypes and formats; None where they can."""
    if not chosen.size:
        return "no token has experts"
    return grouped.unsupported(x, gate) or grouped.unsupported(x, down)


def mixture(
    x: Float[Array, "T *K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Weight,
    up: Weight,
    down: Weight,
    first: Int[Array, ""],
    *,
    activation: Callable[[Array, Array], Array],
    num_experts: int | None,
    interpret: bool = False,
) -> Float32[Array, "T *K"]:
    """See `api.mixture`."""
    tokens, choices = chosen.shape
    rows = x.reshape(tokens, -1)
    size = max(1, BLOCK // choices)
    block = partial(
        _block,
        matrices=(gate, up, down),
        first=first,
        activation=activation,
        experts=num_experts or gate.shape[0],
        interpret=interpret,
    )
    if tokens <= size:
        return block(rows, chosen, weights).reshape(x.shape)
    padding = [(0, -tokens % size), (0, 0)]
    # An expert that no device has
    padded = jnp.pad(rows, padding), jnp.pad(chosen, padding, constant_values=-1), jnp.pad(weights, padding)
    blocks = (array.reshape(-1, size, array.shape[1]) for array in padded)
    y = jax.lax.map(lambda arrays: block(arrays[0], arrays[1], arrays[2]), tuple(blocks))
    return y.reshape(-1, rows.shape[1])[:tokens].reshape(x.shape)


def _block(
    x: Float[Array, "T K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    *,
    matrices: tuple[Weight, Weight, Weight],
    first: Int[Array, ""],
    activation: Callable[[Array, Array], Array],
    experts: int,
    interpret: bool,
) -> Float32[Array, "T K"]:
    gate, up, down = matrices
    (tokens, choices), num_local, flat = chosen.shape, gate.shape[0], chosen.reshape(-1)
    pairs = flat.size
    is_local = (flat >= first) & (flat < first + num_local)
    local = jnp.where(is_local, flat - first, num_local)
    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    # (jnp.bincount would scatter)
    ends = jnp.sum(local[:, None] <= jnp.arange(num_local), axis=0, dtype=jnp.int32)
    rows = rows_of_a_visit(tokens, -(-pairs // experts))
    visits = group_visits(jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends, pairs, rows)
    number, one = jnp.arange(pairs, dtype=jnp.int32), jnp.ones(pairs, jnp.float32)
    run = partial(grouped.multiply_visits, visits=visits, rows=rows, interpret=interpret)
    hidden = run(
        x,
        [gate, up],
        source=order // choices,
        target=number,
        share=one,
        combine=activation,
        dtype=x.dtype,
        name="mixture_glu",
    )
    y = run(
        hidden,
        [down],
        source=number,
        target=order,
        share=weights.reshape(-1)[order],
        combine=lambda y: y,
        dtype=x.dtype,
        name="mixture_down",
    )
    # No program writes the results of other devices' experts
    y = jnp.where(is_local[:, None], y, 0)
    return jnp.sum(y.reshape(tokens, choices, -1).astype(jnp.float32), axis=1)
