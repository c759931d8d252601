"""Messages between devices that differ in some mesh axes, under `Partition.shard_map`.

Model code sees each device's shard of every array, and data moves between devices only where a function of this package
moves it. Where no mesh axis is named, a function returns its argument.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def device_index(names: tuple[str, ...]) -> Array | int:
    """Returns this device's number along these mesh axes, the first outermost."""
    return lax.axis_index(names) if names else 0


def num_devices(names: tuple[str, ...]) -> int:
    """Returns the number of devices along these mesh axes."""
    return lax.axis_size(names) if names else 1


def all_reduce(x: Array, names: tuple[str, ...]) -> Array:
    """Sums `x` over these mesh axes."""
    return lax.psum(x, names) if names else x


def all_gather(x: Array, names: tuple[str, ...], axis: int) -> Array:
    """Joins the shards of `x` over these mesh axes along its dimension `axis`."""
    return lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def reduce_scatter(x: Array, names: tuple[str, ...], axis: int) -> Array:
    """Sums `x` over these mesh axes and keeps this device's shard of the sum's dimension `axis`."""
    return lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True) if names else x


def take_shard(x: Array, names: tuple[str, ...], axis: int) -> Array:
    """Keeps this device's shard of dimension `axis` of an array that all of these devices have."""
    if not names:
        return x
    size = x.shape[axis] // num_devices(names)
    return lax.dynamic_slice_in_dim(x, device_index(names) * size, size, axis=axis)


def gather_blocks(shards: Sequence[Array], names: tuple[str, ...]) -> Array:
    """All-gathers several arrays [..., columns], side by side, over these mesh axes: [devices, ..., all columns]."""
    together = shards[0] if len(shards) == 1 else jnp.concatenate(shards, axis=-1)
    return lax.all_gather(together, names) if names else together[None]


def gather_columns(shards: Sequence[Array], widths: Sequence[int], names: tuple[str, ...]) -> list[Array]:
    """All-gathers column shards of several arrays [..., columns] over these mesh axes, in one message.

    `widths` are the whole arrays' numbers of columns; an array that has as many is returned as it is.
    """
    whole = [shard.shape[-1] == width for shard, width in zip(shards, widths, strict=True)]
    if all(whole):
        return list(shards)
    sent = [shard for shard, complete in zip(shards, whole, strict=True) if not complete]
    blocks = gather_blocks(sent, names)
    ends = [sum(shard.shape[-1] for shard in sent[: i + 1]) for i in range(len(sent) - 1)]
    gathered = iter(
        jnp.moveaxis(block, 0, -2).reshape(*block.shape[1:-1], -1) for block in jnp.split(blocks, ends, axis=-1)
    )
    return [shard if complete else next(gathered) for shard, complete in zip(shards, whole, strict=True)]
