"""Which experts a kernel visits, and which pairs of a token and an expert of its each of them has."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32


class Visits(NamedTuple):
    """Of visit v of core c the expert at [v * cores + c], or `held` past the last; of each expert the number of its
    first visit, the first of its pairs and their end; pairs, sorted by expert, as expert * pairs + number."""

    expert: Int32[Array, "visits"]
    visit: Int32[Array, "held"]
    start: Int32[Array, "held"]
    end: Int32[Array, "held"]
    pair: Int32[Array, "pairs"]


def visits(
    chosen: Int32[Array, "T J"], first: Int[Array, ""] | int, held: int, rows: int, cores: int
) -> tuple[Visits, Int32[Array, ""]]:
    """Those of the `held` experts from number `first` on that somebody chose, as many as it takes if one has `rows`
    pairs; and how many visits each core makes: one at least."""
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < held), local, held)
    pair = lax.sort(local * local.size + jnp.arange(local.size, dtype=jnp.int32), is_stable=False)
    number = jnp.arange(held, dtype=jnp.int32)
    start = jnp.sum(local[:, None] < number, axis=0, dtype=jnp.int32)
    end = jnp.sum(local[:, None] <= number, axis=0, dtype=jnp.int32)
    # Visit n is of the first expert that n + 1 visits are made up to. (jnp.nonzero would scatter.)
    wanted = (end - start + (rows - 1)) // rows
    up_to = jnp.sum(jnp.where(number[:, None] <= number, wanted[:, None], 0), axis=0, dtype=jnp.int32)
    slots = jnp.arange(held + local.size // rows + cores, dtype=jnp.int32)
    expert = jnp.sum(up_to <= slots[:, None], axis=1, dtype=jnp.int32)
    each = jnp.maximum((jnp.sum(wanted, dtype=jnp.int32) + (cores - 1)) // cores, 1)
    return Visits(expert, up_to - wanted, start, end, pair), each
