"""The gradient of `kda`, for every implementation: groups of chunks in reverse, each recomputed from its state.

The forward pass saves the arguments and the state before each group of chunks. The backward pass takes the groups from
the last to the first and carries the gradient of every segment's state; intermediate results exist for one group at a
time. The state before a group is all that must be saved of the past: segments that have ended do not enter the group,
and later segments begin from their initial states.

dg is the sum, over pairs of tokens with t between them, of what exp(g_{j+1} + ... + g_i) contributes; written as a
reverse cumulative sum of q dq - k dk (arXiv 2510.26692), large terms cancel. Here a group is differentiated through the
binary splitting of `decays`, whose sums are each within one block: every exponent's gradient is summed from its own
terms only, in float32, and nothing cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Backend
from pallas_kernels.kda import xla


def save_group_states(backends: Sequence[Backend], **options: Any) -> tuple[Backend, ...]:
    """Makes the backends of the op return the state before each group of chunks too.

    A kernel's results stay as they are; the states come from the chunked form, computed in addition.
    """
    chunked = partial(xla.chunked, group_states=True, **options)

    def add_group_states(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays, **how: (*kernel(*arrays, **how), chunked(*arrays)[2])

    return tuple(
        replace(backend, run=chunked if backend.name == "xla" else add_group_states(backend.run))
        for backend in backends
    )


def differentiable(run: Callable[..., Any], run_saving: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `run` of (q, k, v, g, beta, states, segment_ids) with its gradient.

    `options` are those of `xla.advance_group`.
    """

    @jax.custom_vjp
    def function(*arrays: Any) -> Any:
        return run(*arrays)

    def forward(*arrays: Any) -> tuple[Any, Any]:
        o, states, given = run_saving(*arrays)
        return (o, states), (arrays, given)

    def backward(kept: Any, cotangents: Any) -> Any:
        return *_gradients(*kept, *cotangents, **options), None

    function.defvjp(forward, backward)
    return function


def _gradients(
    arrays: tuple[Any, ...],
    given: Float[Array, "groups B H Dk Dv"],
    do: Float[Array, "B T H Dv"],
    dstates: Float[Array, "B N H Dk Dv"],
    **options: Any,
) -> tuple[Array, ...]:
    *inputs, initial, segment_ids = arrays
    groups = xla.ChunkGroups.make(inputs[4], initial, segment_ids)

    def step(dstates: Array, group: tuple[Any, ...]) -> tuple[Array, xla.Tokens]:
        tokens, segments, state, do = group
        states = xla.put_state(initial, segments[0], state)
        _, pull = jax.vjp(partial(xla.advance_group, segments=segments, **options), states, tokens)
        return pull((dstates, do))

    tokens = tuple(groups.split(array) for array in inputs)
    dstates, dtokens = lax.scan(step, dstates, (tokens, groups.segments, given, groups.split(do)), reverse=True)
    return *(groups.join(array) for array in dtokens), dstates
