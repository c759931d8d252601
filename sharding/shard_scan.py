"""A recurrence over prompts whose tokens are sharded over the mesh, in order: states pass from shard to shard.

The state's map over a shard's tokens is affine, S -> M S + U, whatever state comes in (arXiv 2510.26692, from the delta
rule; its chunks are treated alike). Devices gather M [k, k] and U [k, v] of each head, no tokens and no states; from
these each computes the state before its own tokens, and the last one.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from sharding.collectives import all_reduce, device_index, num_devices


def shift_right(
    x: Float[Array, "b ..."], first: Float[Array, "b ..."], names: tuple[str, ...]
) -> Float[Array, "b ..."]:
    """Sends `x` to the device with the next tokens and returns the one that arrives; the first device gets `first`."""
    if not names:
        return first
    received = lax.ppermute(x, names, [(i, i + 1) for i in range(num_devices(names) - 1)])
    return jnp.where(device_index(names) == 0, first, received)


def select_last(x: Float[Array, "b ..."], counts: Int32[Array, "b"], size: int, names: tuple[str, ...]) -> Array:
    """Returns each row's `x` from the device with the row's last token.

    `counts` are the row's tokens on this device; a shard has room for `size` of them, and shards fill in order.
    """
    if not names:
        return x
    last = jnp.maximum(all_reduce(counts, names) - 1, 0) // size
    is_last = (last == device_index(names)).reshape(-1, *(1,) * (x.ndim - 1))
    return all_reduce(jnp.where(is_last, x, 0), names)


def scan_shards(
    state: Float32[Array, "b h k v"],
    transition: Float32[Array, "b h k k"],
    update: Float32[Array, "b h k v"],
    names: tuple[str, ...],
) -> tuple[Float32[Array, "b h k v"], Float32[Array, "b h k v"]]:
    """Returns the state before this device's tokens and the state after all tokens.

    `state` is the one before all tokens; `transition` and `update` are M and U of this device's tokens.
    """
    maps = lax.all_gather((transition, update), names)

    def step(before: Array, shard: tuple[Array, Array]) -> tuple[Array, Array]:
        M, U = shard
        return jnp.einsum("bhij,bhjv->bhiv", M, before, precision=lax.Precision.HIGHEST) + U, before

    last, before = lax.scan(step, state, maps)
    return lax.dynamic_index_in_dim(before, device_index(names), keepdims=False), last
