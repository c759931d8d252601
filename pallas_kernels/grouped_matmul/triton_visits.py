"""The visits of a Pallas-Triton kernel to the groups of a ragged batch: a visit takes rows of one group."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

ROWS = (16, 32, 64, 128)


def rows_of_a_visit(tokens: int, mean: int) -> int:
    """Returns how many rows a visit takes, of groups of at most `tokens` rows each and `mean` on the average: of even
    groups most need one visit."""
    wanted = min(tokens, 2 * mean)
    return next((rows for rows in ROWS if rows >= wanted), ROWS[-1])


class GroupVisits(NamedTuple):
    """Each visit's group, its first row, and how many rows it has, none for those past the last visit."""

    group: Int32[Array, "visits"]
    first: Int32[Array, "visits"]
    size: Int32[Array, "visits"]


def most_visits(tokens: int, groups: int, rows: int) -> int:
    """Returns how many visits there are at most, whatever the sizes of the groups."""
    full = min(tokens, groups)
    return full + (tokens - full) // rows


def group_visits(starts: Int32[Array, "groups"], ends: Int32[Array, "groups"], tokens: int, rows: int) -> GroupVisits:
    """Lists the visits of groups with rows [start, end) of `tokens` in all, group by group."""
    groups = starts.shape[0]
    wanted = (ends - starts + (rows - 1)) // rows
    number = jnp.arange(groups, dtype=jnp.int32)
    up_to = jnp.sum(jnp.where(number[:, None] >= number, wanted, 0), axis=1, dtype=jnp.int32)
    visit = jnp.arange(most_visits(tokens, groups, rows), dtype=jnp.int32)
    # Visit v is of the first group that v + 1 visits are made up to. (jnp.nonzero would scatter.)
    group = jnp.sum(up_to <= visit[:, None], axis=1, dtype=jnp.int32)
    there, group = group < groups, jnp.minimum(group, groups - 1)
    first = starts[group] + (visit - (up_to - wanted)[group]) * rows
    count = jnp.where(there, jnp.minimum(ends[group] - first, rows), 0)
    return GroupVisits(group, first, count)
