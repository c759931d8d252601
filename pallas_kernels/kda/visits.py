"""The chunk kernel's list of work: the chunks of a row of packed sequences and the segments in each."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32


class ChunkVisits(NamedTuple):
    """Each visit's chunk and segment, and the number of a row's visits; entries past these repeat the last."""

    chunk: Int32[Array, "B visits"]
    segment: Int32[Array, "B visits"]
    total: Int32[Array, "B"]


def chunk_visits(segment_ids: Int[Array, "B T"], num_segments: int, size: int) -> ChunkVisits:
    """Lists the pairs of a chunk of `size` tokens and a segment with tokens in it, in order; ids are as in `api.kda`.

    A segment extends to the beginning of the next one, the first from the row's beginning: so every chunk is visited,
    padding or not, and an empty segment has a visit too. There are at most ceil(T / size) + num_segments - 1 visits.
    """
    tokens = segment_ids.shape[1]
    chunks = -(-tokens // size)
    before = lax.cummax(segment_ids, axis=1)[:, None] < jnp.arange(num_segments)[:, None]
    starts = jnp.sum(before, axis=2).at[:, 0].set(0)
    ends = jnp.concatenate([starts[:, 1:], jnp.full_like(starts[:, :1], tokens)], axis=1)
    first = jnp.minimum(starts // size, chunks - 1)
    many = jnp.maximum((ends - 1) // size - first, 0) + 1
    stops = jnp.cumsum(many, axis=1)
    visit = jnp.minimum(jnp.arange(chunks + num_segments - 1), stops[:, -1:] - 1)
    segment = jnp.sum(stops[:, None] <= visit[:, :, None], axis=2)
    chunk = visit - jnp.take_along_axis(stops - many - first, segment, axis=1)
    return ChunkVisits(*(array.astype(jnp.int32) for array in (chunk, segment, stops[:, -1])))
