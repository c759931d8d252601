"""A row's pages over the `sequence` axis, in turn: page p lies on device p mod S as its page p div S.

So all devices have about as many tokens of every row, however long it has grown. Attention over a part gives a partial
softmax; parts are merged by their log-sum-exp (arXiv 2205.14135, section 3.1).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32, Int32

from sharding.collectives import index, over, part_of, parts, size, split
from sharding.mesh import AXES

# Where so many devices are all there are, libtpu makes a sum of a gather among them if its result has fewer bytes (it
# does of 9 MB, not of 18): the operand is then as large as the result.
SUMMED_FROM, SUMMED_BELOW = 64, 2**24


def own_positions(positions: Int32[Array, "..."], page: int) -> Int32[Array, "..."]:
    """Token positions as this device numbers its own; -1 for those of others, and for -1."""
    if (count := parts("row_pages")) == 1:
        return positions
    number, within = positions // page, positions % page
    mine = (positions >= 0) & (number % count == part_of("row_pages"))
    return jnp.where(mine, number // count * page + within, -1)


def held(lengths: Int32[Array, "b"], page: int) -> Int32[Array, "b"]:
    """How many of a row's first tokens this device has: they are the first in its own pages."""
    if (count := parts("row_pages")) == 1:
        return lengths
    full, part = lengths // page, part_of("row_pages")
    before = (full + count - 1 - part) // count
    return before * page + jnp.where(full % count == part, lengths % page, 0)


def page_numbers(first: Array | int, count: int) -> Int32[Array, "part pages"]:
    """Which pages of a row the local ones from `first` on are, on every device of the axis."""
    local = first + jnp.arange(count, dtype=jnp.int32)
    return local * parts("row_pages") + jnp.arange(parts("row_pages"), dtype=jnp.int32)[:, None]


def from_all(x: Array) -> Array:
    """The parts of x [b, n, ...] that the devices with a row's pages have, one after another along the second axis."""
    if not (names := over("row_pages")):
        return x
    gather = partial(lax.all_gather, axis_name=names, axis=1, tiled=True)
    devices, all_devices = size(names), jax.sharding.get_abstract_mesh().size
    if devices < max(SUMMED_FROM, all_devices) or devices * x.size * x.dtype.itemsize >= SUMMED_BELOW:
        return gather(x)
    return lax.platform_dependent(x, tpu=partial(by_ragged, names), default=gather)


def by_ragged(names: tuple[str, ...], x: Array) -> Array:
    """`from_all` by a `ragged_all_to_all` in which each device sends every other one the same, all that it has."""
    devices = size(names)
    one = jnp.ones(devices, jnp.int32)  # row, x as a whole
    room = jnp.zeros((devices, *x.shape), x.dtype)
    found = lax.ragged_all_to_all(x[None], room, 0 * one, one, index(names) * one, one, axis_name=names)
    return jnp.moveaxis(found, 0, 1).reshape(len(x), -1, *x.shape[2:])


def longest(lengths: Int32[Array, "b"]) -> Int32[Array, ""]:
    """The greatest length of any row on any device: loops over a history then make as many turns everywhere."""
    names = split(AXES)
    greatest = jnp.max(lengths, initial=0)
    return lax.pmax(greatest, names) if names else greatest


def merged(out: Float[Array, "b heads v"], lse: Float32[Array, "b heads"]) -> Float[Array, "b h v"]:
    """Softmaxes over each device's tokens, of the heads of all -> over all tokens, of this device's heads."""
    names = over("row_pages")
    if not names:
        return out
    (batch, heads, width), count = out.shape, parts("row_pages")
    both = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    both = lax.all_to_all(both.reshape(batch, count, heads // count, width + 1), names, 1, 0)
    # Left to itself a TPU puts the width first, where slices of it are free and tiles almost empty.
    both = with_layout_constraint(both.reshape(count, -1, width + 1), Layout(major_to_minor=(0, 1, 2)))
    outs, lses = both[..., :width], both[..., width:]
    top = jnp.max(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(top), 0, top))
    share = jnp.sum(weights, axis=0)
    joined = jnp.sum(weights * outs, axis=0) / jnp.where(share == 0, 1, share)
    return joined.reshape(batch, heads // count, width).astype(out.dtype)
