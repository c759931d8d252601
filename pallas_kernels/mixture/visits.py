"""The experts that a kernel visits, and the pairs of a token and one of its experts that belong to each."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32


class ExpertVisits(NamedTuple):
    """Entry [v * cores + c] of `expert` is the expert of visit v of core c, or `num_local` past the last.

    `visit`, `start` and `end` are each expert's first visit and where its pairs begin and end in `pair`, which has
    their numbers, token * J + choice, plus any multiple of the number of all pairs.
    """

    expert: Int32[Array, "visits"]
    visit: Int32[Array, "experts"]
    start: Int32[Array, "experts"]
    end: Int32[Array, "experts"]
    pair: Int32[Array, "list"]


def expert_visits(
    chosen: Int32[Array, "T J"], first: Int[Array, ""] | int, num_local: int, rows: int, cores: int
) -> tuple[ExpertVisits, Int32[Array, ""]]:
    """Lists visits of the experts that some token chose, and returns the number of visits of each core, at least one.

    The local experts are the `num_local` from number `first` on; a visit takes up to `rows` pairs.
    """
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < num_local), local, num_local)
    pair = lax.sort(local * local.size + jnp.arange(local.size, dtype=jnp.int32), is_stable=False)
    number = jnp.arange(num_local, dtype=jnp.int32)
    start = jnp.sum(local[:, None] < number, axis=0, dtype=jnp.int32)
    end = jnp.sum(local[:, None] <= number, axis=0, dtype=jnp.int32)
    # Visit n is of the first expert that n + 1 visits are made up to. (jnp.nonzero would scatter.)
    wanted = (end - start + (rows - 1)) // rows
    up_to = jnp.sum(jnp.where(number[:, None] <= number, wanted[:, None], 0), axis=0, dtype=jnp.int32)
    slots = jnp.arange(num_local + local.size // rows + cores, dtype=jnp.int32)
    expert = jnp.sum(up_to <= slots[:, None], axis=1, dtype=jnp.int32)
    per_core = jnp.maximum((jnp.sum(wanted, dtype=jnp.int32) + (cores - 1)) // cores, 1)
    return ExpertVisits(expert, up_to - wanted, start, end, pair), per_core
