"""The order in which a Pallas kernel works through a ragged batch: a visit is a block of rows and a group in it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int, Int32

from pallas_kernels.grouped_matmul.blocks import local_groups

WINDOWS = (16, 32, 64, 128, 256, 512)


def window_size(tokens: int, groups: int) -> int:
    """Returns the rows that one matrix product takes: a number near the groups' mean."""
    mean = -(-tokens // groups)
    return next(rows for rows in WINDOWS if rows >= min(mean, WINDOWS[-1]))


class BlockVisits(NamedTuple):
    """Each visit's block and group, the number of visits, and each group's first row and end."""

    block: Int32[Array, "visits"]
    group: Int32[Array, "visits"]
    total: Int32[Array, "1"]
    start: Int32[Array, "local"]
    end: Int32[Array, "local"]


def block_visits(
    group_sizes: Int32[Array, "all"], group_offset: Int[Array, ""], num_local: int, blocks: int, size: int
) -> BlockVisits:
    """Lists the pairs of a block and a local group with rows in it, block by block.

    A block without any visits group 0, of which it has no rows, so that every block is written.
    """
    starts, ends = local_groups(group_sizes, group_offset, num_local)
    first = size * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    wanted = jnp.minimum(ends, first + size) > jnp.maximum(starts, first)
    wanted |= ~wanted.any(axis=1, keepdims=True) & (jnp.arange(num_local) == 0)
    # The n-th pair wanted is the first that n + 1 are wanted up to. (jnp.nonzero would scatter.)
    up_to = jnp.cumsum(wanted.reshape(-1), dtype=jnp.int32)
    chosen = jnp.sum(up_to <= jnp.arange(blocks + num_local, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32)
    chosen = jnp.minimum(chosen, wanted.size - 1)
    return BlockVisits(chosen // num_local, chosen % num_local, up_to[-1:], starts, ends)


def every_block(rows: int, blocks: int, size: int) -> BlockVisits:
    """Lists the visits of a single group of all `rows` in `blocks` blocks of `size`: known while tracing, so that
    nothing computes them."""
    numbers = (range(blocks), [0] * blocks, [blocks], [0], [rows])
    return BlockVisits(*(jnp.asarray(np.array(of, np.int32)) for of in numbers))


def group_visits(
    group_sizes: Int32[Array, "all"], group_offset: Int[Array, ""], num_local: int, blocks: int, size: int
) -> BlockVisits:
    """Lists the pairs of a local group and a block with rows of it, group by group.

    A group without rows visits one block, of which it has no rows, so that every group is written. There are at most
    blocks + num_local - 1 visits; entries past these repeat the last.
    """
    starts, ends = local_groups(group_sizes, group_offset, num_local)
    first = jnp.minimum(starts // size, blocks - 1)
    many = jnp.maximum((ends - 1) // size - first, 0) + 1
    stops = jnp.cumsum(many, dtype=jnp.int32)
    visit = jnp.minimum(jnp.arange(blocks + num_local - 1, dtype=jnp.int32), stops[-1] - 1)
    group = jnp.sum(stops <= visit[:, None], axis=1, dtype=jnp.int32)
    return BlockVisits(visit - (stops - many - first)[group], group, stops[-1:], starts, ends)


def list_visits(sizes_ref: Any, offset_ref: Any, visit: BlockVisits, blocks: int, size: int) -> None:
    """Writes, inside a Pallas kernel, the visits of `blocks` blocks of `size` rows to the references of `visit`.

    They are the pairs of a block and a local group with rows in it, block by block. A block without any visits the
    next group with rows, of which it has none, so that every block is written.
    """

    def pairs(begin: Any, stop: Any, group: Any, v: Any) -> Any:
        def pair(block: Any, v: Any) -> Any:
            visit.block[v], visit.group[v] = block, group
            return v + 1

        return lax.fori_loop(begin, stop, pair, v)

    def group(i: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        v, start, listed = state
        end = start + sizes_ref[offset_ref[0] + i]
        visit.start[i], visit.end[i] = start, end
        begin = jnp.where(end > start, jnp.minimum(start // size, listed), listed)
        stop = jnp.where(end > start, pl.cdiv(end, size), listed)
        return pairs(begin, stop, i, v), end, stop

    start = lax.fori_loop(0, offset_ref[0], lambda i, row: row + sizes_ref[i], 0)
    v, _, listed = lax.fori_loop(0, visit.start.shape[0], group, (0, start, 0))
    visit.total[0] = pairs(listed, blocks, 0, v)
