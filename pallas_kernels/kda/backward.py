"""The gradient of `kda`: chunks in reverse, each recomputed from the state before it, which the forward pass saves.

The state before a chunk is all that must be saved of the past: segments that have ended do not enter it, and later
segments begin from their initial states. TPUs have a kernel (`mosaic_backward`). In plain JAX, groups of chunks are
taken from the last to the first, with the gradient of every segment's state carried from one to the next, so that
intermediate results exist for one group at a time.

dg is the sum, over pairs of tokens with t between them, of what exp(g_{j+1} + ... + g_i) contributes; written as a
reverse cumulative sum of q dq - k dk (arXiv 2510.26692), large terms cancel. Here a group is differentiated through the
binary splitting of `decays`, whose sums are each within one block: every exponent's gradient is summed from its own
terms only, in float32, and nothing cancels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.kda import xla
from pallas_kernels.kda.chunk_groups import ChunkGroups


def differentiable(
    run: Callable[..., Any], run_saving: Callable[..., Any], run_backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns `run` of (q, k, v, g, beta, states, segment_ids) with its gradient.

    `run_saving` also returns the state before each chunk; `run_backward` takes the arguments of `gradients`.
    """

    @jax.custom_vjp
    def function(*arrays: Any) -> Any:
        return run(*arrays)

    def forward(*arrays: Any) -> tuple[Any, Any]:
        o, states, saved = run_saving(*arrays)
        *inputs, initial, segment_ids = arrays
        return (o, states), (inputs, initial, segment_ids, saved)

    def backward(kept: Any, cotangents: Any) -> Any:
        inputs, initial, segment_ids, saved = kept
        return *run_backward(*inputs, initial, saved, *cotangents, segment_ids), None

    function.defvjp(forward, backward)
    return function


def gradients(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    initial: Float[Array, "B N H Dk Dv"],
    saved: Float[Array, "B chunks H Dk Dv"],
    do: Float[Array, "B T H Dv"],
    dstates: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    outputs_only: bool = False,
    **options: Any,
) -> tuple[Array, ...]:
    """Returns the gradients of q, k, v, g, beta and the initial states, in plain JAX.

    `saved` are the states before each chunk (`xla.chunked`), `do` and `dstates` the gradients of its results,
    `outputs_only` is its option, `options` are those of `xla.advance_group`. With `outputs_only` the gradient of the
    initial states is left at zero.
    """
    inputs = (q, k, v, g, beta)
    groups = ChunkGroups.make(beta, initial, segment_ids, outputs_only)

    def step(dstates: Array, group: tuple[Any, ...]) -> tuple[Array, xla.Tokens]:
        tokens, segments, owners, state, do = group
        states = xla.put_state(groups.carried(initial), segments[0], state)
        advance = partial(xla.advance_group, segments=segments, owners=owners, **options)
        _, pull = jax.vjp(advance, states, tokens)
        return pull((dstates, do))

    tokens = tuple(groups.split(array) for array in inputs)
    carried = groups.carried(jnp.zeros_like(dstates) if outputs_only else dstates)
    steps = (tokens, groups.segments, groups.owners, groups.first_states(saved), groups.split(do))
    before, dtokens = lax.scan(step, carried, steps, reverse=True)
    return *(groups.join(array) for array in dtokens), jnp.zeros_like(dstates) if outputs_only else before
