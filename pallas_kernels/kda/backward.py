"""The gradient of `kda`, for every implementation: groups of chunks in reverse, each recomputed from its state.

The forward pass leaves the arguments, as they were given, and the state before each group of chunks. The backward pass
takes the groups from the last to the first and carries the gradient of every segment's state; a group's intermediate
results exist while its turn lasts. The state before a group is all that must be kept of the past: segments that are
over do not enter it, and those still to come begin from their initial states.

dg is the sum, over pairs of tokens with t between them, of what exp(g_{j+1} + ... + g_i) contributes; written as a
reverse cumulative sum of q dq - k dk (arXiv 2510.26692), large terms cancel. Here a group is differentiated through the
binary splitting of `decays`, whose sums each lie within one block: every exponent's gradient is summed from its own
terms only, in float32, and nothing cancels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.kda import xla


def saving(available: Mapping[str, Callable[..., Any]], **options: Any) -> dict[str, Callable[..., Any]]:
    """The implementations of an op, each made to give the state before each group of chunks too.

    A kernel's own results stay; the states then come from the chunked form beside it.
    """
    chunked = partial(xla.chunked, group_states=True, **options)

    def beside(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays, **how: (*kernel(*arrays, **how), chunked(*arrays)[2])

    return {name: chunked if name == "xla" else beside(run) for name, run in available.items()}


def differentiable(run: Callable[..., Any], run_saving: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`run` of (q, k, v, g, beta, states, segment_ids) with its gradient; `options` are `xla.group_of_chunks`'."""

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
    groups = xla.Groups.of(inputs[4], initial, segment_ids)

    def step(dstates: Array, group: tuple[Any, ...]) -> tuple[Array, xla.Tokens]:
        tokens, segments, state, do = group
        states = xla.put_state(initial, segments[0], state)
        _, pull = jax.vjp(partial(xla.group_of_chunks, segments=segments, **options), states, tokens)
        return pull((dstates, do))

    tokens = tuple(groups.split(array) for array in inputs)
    dstates, dtokens = lax.scan(step, dstates, (tokens, groups.segments, given, groups.split(do)), reverse=True)
    return *(groups.join(array) for array in dtokens), dstates
