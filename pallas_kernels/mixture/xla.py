"""A mixture of experts for any number of tokens: the grouped ops on rows sorted by expert, in blocks.

A few tokens that choose each expert twice on the average meet all of them on a CPU, where products with whole stacks
of matrices run on all cores and read each matrix once and in place. The grouped ops' loops run on one core, and read an
expert's matrices for each of its tokens.

Otherwise pairs of a token and one of its experts are sorted, those of local experts first, and taken in blocks, so that
memory and work are bounded by the number of local pairs. The first block has room for twice as many as there are if
experts are chosen evenly, and more blocks run only where there are more pairs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.formats import Dense, Weight
from pallas_kernels.grouped_matmul import grouped_glu, grouped_matmul

# The most pairs of a token and one of its experts whose vectors exist at one time.
BLOCK = 8192
# A block is a multiple of this, if there are as many pairs.
MULTIPLE = 128
# The most tokens that meet all experts on a CPU. CPU time of a layer of the 48M-parameter toys with 8 of 32 experts a
# token, so and otherwise (where it is one core's): 4 tokens 5.2 and 3.1 ms, 8 tokens 5.9 and 5.2, 16 tokens 7.0 and
# 7.1, 32 tokens 13.8 and 11.0.
FEW_TOKENS = 32


def mixture(
    x: Float[Array, "T *K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Weight,
    up: Weight,
    down: Weight,
    first: Any,  # int32 []; a constant may come as NumPy's
    *,
    activation: Callable[[Array, Array], Array],
    num_experts: int | None,
    implementation: str | None = None,
) -> Float32[Array, "T *K"]:
    """See `api.mixture`. The grouped ops are computed by `implementation`."""
    arguments = (x, chosen, weights, gate, up, down, first)
    by_expert = partial(_sorted, activation=activation, num_experts=num_experts, implementation=implementation)
    twice = chosen.size >= 2 * (num_experts or gate.shape[0])
    if isinstance(gate, Dense) and 0 < len(x) <= FEW_TOKENS and twice:
        all_experts = partial(_every_expert, activation=activation)
        return jax.lax.platform_dependent(*arguments, cpu=all_experts, default=by_expert)
    return by_expert(*arguments)


def _every_expert(
    x: Float[Array, "T *K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Dense,
    up: Dense,
    down: Dense,
    first: Any,
    *,
    activation: Callable[[Array, Array], Array],
) -> Float32[Array, "T *K"]:
    """Computes every local expert for every token, and sums those that a token chose."""
    rows = x.reshape(len(x), -1)
    is_chosen = chosen.T[:, None] == first + jnp.arange(gate.shape[0])[:, None]  # [J, E, T]
    share = jnp.sum(jnp.where(is_chosen, weights.T[:, None], 0), axis=0)

    # The matrices come first: XLA on CPU transposes a second operand like them, which takes longer than the product.
    # Gates and ups are one matrix each, so that the product is divided among the cores
    experts, width, _ = gate.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    wholes = (weight.weight.reshape(experts * width, -1) for weight in (gate, up))
    hidden = activation(*(product("nk,tk->nt", whole, rows) for whole in wholes)).astype(x.dtype)
    y = product("ekn,ent->ekt", down.weight, hidden.reshape(experts, width, -1)).astype(jnp.float32)
    # An expert that a token did not choose may give it anything: 0 * NaN is NaN
    y = jnp.sum(jnp.where(is_chosen.any(axis=0)[:, None], share[:, None] * y, 0), axis=0)
    return y.T.reshape(x.shape)


def _sorted(
    x: Float[Array, "T *K"],
    chosen: Int32[Array, "T J"],
    weights: Float32[Array, "T J"],
    gate: Weight,
    up: Weight,
    down: Weight,
    first: Any,  # int32 []; a constant may come as NumPy's
    *,
    activation: Callable[[Array, Array], Array],
    num_experts: int | None,
    implementation: str | None = None,
) -> Float32[Array, "T *K"]:
    """Computes a mixture of rows sorted by expert."""
    num_local, choices, flat = gate.shape[0], chosen.shape[1], chosen.reshape(-1)
    if not flat.size:
        return jnp.zeros(x.shape, jnp.float32)
    even_share = -(-2 * flat.size * num_local // (num_experts or num_local) // MULTIPLE) * MULTIPLE
    size = min(BLOCK, flat.size, even_share)
    local = jnp.where((flat >= first) & (flat < first + num_local), flat - first, num_local)
    order = jnp.argsort(local, stable=True)
    # (jnp.bincount would scatter, which a TPU sends to its SparseCore and back)
    ends = jnp.sum(local[:, None] <= jnp.arange(num_local), axis=0, dtype=jnp.int32)
    order = jnp.pad(order, (0, -order.size % size))

    def block(begin: Array | int) -> Array:
        pairs = jax.lax.dynamic_slice_in_dim(order, begin, size)
        sizes = jnp.diff(jnp.clip(ends - begin, 0, size), prepend=0).astype(jnp.int32)
        tokens = pairs // choices
        rows = x[tokens].reshape(size, -1)
        y = grouped_glu(rows, gate, up, sizes, activation=activation, implementation=implementation)
        y = grouped_matmul(y, down, sizes, implementation=implementation)
        share = jnp.where(begin + jnp.arange(size) < ends[-1], weights.reshape(-1)[pairs], 0)
        y = (share[:, None] * y.astype(jnp.float32)).reshape(size, *x.shape[1:])
        return jnp.zeros(x.shape, jnp.float32).at[tokens].add(y)

    if size == flat.size:
        return block(0)
    one_of_many = jax.checkpoint(block)  # a gradient keeps nothing of one block while it works on another

    def add(total: Array, begin: Array) -> tuple[Array, None]:
        return jax.lax.cond(
            begin < ends[-1], lambda total: total + one_of_many(begin), lambda total: total, total
        ), None

    def other_blocks(total: Array) -> Array:
        return jax.lax.scan(add, total, jnp.arange(size, order.size, size))[0]

    return jax.lax.cond(ends[-1] > size, other_blocks, lambda total: total, one_of_many(0))
