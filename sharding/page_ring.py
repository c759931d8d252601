"""A row's pages dealt in turn to the devices of the `sequence` axis: page p is page p div S of device p mod S.

So all devices have about as many tokens of every row, however long it has grown. Attention over a device's pages gives
a partial softmax; partial softmaxes are merged by their log-sum-exp (arXiv 2205.14135, section 3.1).
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from sharding.collectives import device_index, num_devices
from sharding.partition import Partition

# Given a gather among at least so many devices, all that there are, libtpu compiles a sum if the result has fewer bytes
# (a sum for 9 MB, a gather for 18): each operand is then as large as the result.
SUMMED_FROM, SUMMED_BELOW = 64, 2**24


def local_positions(positions: Int32[Array, "..."], page: int, partition: Partition) -> Int32[Array, "..."]:
    """Renumbers token positions within this device's own pages; -1 for tokens of other devices, and for -1."""
    if (count := partition.num_shards("row_pages")) == 1:
        return positions
    number, offset = positions // page, positions % page
    is_local = (positions >= 0) & (number % count == partition.shard_index("row_pages"))
    return jnp.where(is_local, number // count * page + offset, -1)


def local_lengths(lengths: Int32[Array, "b"], page: int, partition: Partition) -> Int32[Array, "b"]:
    """Counts the tokens of each row on this device, out of `lengths`; they are the first in its own pages."""
    if (count := partition.num_shards("row_pages")) == 1:
        return lengths
    full, shard = lengths // page, partition.shard_index("row_pages")
    full_local = (full + count - 1 - shard) // count
    return full_local * page + jnp.where(full % count == shard, lengths % page, 0)


def ring_page_numbers(first: Array | int, count: int, partition: Partition) -> Int32[Array, "shards pages"]:
    """Returns each device's numbers, among all pages of a row, of `count` local pages from `first` on."""
    local, shards = first + jnp.arange(count, dtype=jnp.int32), partition.num_shards("row_pages")
    return local * shards + jnp.arange(shards, dtype=jnp.int32)[:, None]


def gather_pages(x: Array, partition: Partition) -> Array:
    """All-gathers x [b, n, ...] from the devices with a row's pages: [b, shards * n, ...], one shard after another."""
    if not (names := partition.axis_names("row_pages")):
        return x
    gather = partial(lax.all_gather, axis_name=names, axis=1, tiled=True)
    devices = num_devices(names)
    if devices < max(SUMMED_FROM, partition.devices) or devices * x.size * x.dtype.itemsize >= SUMMED_BELOW:
        return gather(x)
    return lax.platform_dependent(x, tpu=partial(gather_ragged, names), default=gather)


def gather_ragged(names: tuple[str, ...], x: Array) -> Array:
    """Computes `gather_pages` by a `ragged_all_to_all` in which each device sends its whole `x` to every other one."""
    devices = num_devices(names)
    one = jnp.ones(devices, jnp.int32)  # row, x as a whole
    room = jnp.zeros((devices, *x.shape), x.dtype)
    received = lax.ragged_all_to_all(x[None], room, 0 * one, one, device_index(names) * one, one, axis_name=names)
    return jnp.moveaxis(received, 0, 1).reshape(len(x), -1, *x.shape[2:])


def longest_length(lengths: Int32[Array, "b"], partition: Partition) -> Int32[Array, ""]:
    """Returns the greatest length of any row on any device: loops over a history then make as many turns everywhere."""
    longest = jnp.max(lengths, initial=0)
    return lax.pmax(longest, partition.mesh_axes) if partition.mesh_axes else longest


def exchange_partials(
    packed: Float32[Array, "S b heads packed"], partition: Partition
) -> Float32[Array, "S b heads packed"]:
    """Exchanges attentions over each device's tokens, given for the heads of each of S devices, and returns those over
    all devices' tokens for this device's heads."""
    names = partition.axis_names("row_pages")
    return lax.all_to_all(packed, names, 0, 0, tiled=True) if names else packed
