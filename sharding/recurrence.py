"""A recurrence along prompts whose tokens are split over the mesh, in order; states pass from device to device.

The state's map over a device's tokens is affine, S -> M S + U, whatever state they are met with (arXiv 2510.26692, from
the delta rule; the same is done for its chunks). Devices tell each other M and U, [k, k] and [k, v] a head, and no
tokens and no state; then each knows the state that its own tokens are met with, and the last.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from sharding.collectives import index, size, total


def from_left(x: Float[Array, "b ..."], first: Float[Array, "b ..."], names: tuple[str, ...]) -> Float[Array, "b ..."]:
    """The `x` of the device with the tokens before; the first has `first`."""
    if not names:
        return first
    received = lax.ppermute(x, names, [(i, i + 1) for i in range(size(names) - 1)])
    return jnp.where(index(names) == 0, first, received)


def of_last(x: Float[Array, "b ..."], counts: Int32[Array, "b"], most: int, names: tuple[str, ...]) -> Array:
    """Each row's `x` of the device with its last token, of which a device has `counts`, the first ones `most`."""
    if not names:
        return x
    last = jnp.maximum(total(counts, names) - 1, 0) // most
    mine = (last == index(names)).reshape(-1, *(1,) * (x.ndim - 1))
    return total(jnp.where(mine, x, 0), names)


def passed_on(
    state: Float32[Array, "b h k v"],
    transition: Float32[Array, "b h k k"],
    update: Float32[Array, "b h k v"],
    names: tuple[str, ...],
) -> tuple[Float32[Array, "b h k v"], Float32[Array, "b h k v"]]:
    """The state that this device's tokens are met with, and the one after all tokens, from the one before all."""
    maps = lax.all_gather((transition, update), names)

    def after(before: Array, each: tuple[Array, Array]) -> tuple[Array, Array]:
        M, U = each
        return jnp.einsum("bhij,bhjv->bhiv", M, before, precision=lax.Precision.HIGHEST) + U, before

    last, before = lax.scan(after, state, maps)
    return lax.dynamic_index_in_dim(before, index(names), keepdims=False), last
