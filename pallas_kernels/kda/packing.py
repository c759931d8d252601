"""Several sequences packed in one row: assigns tokens to chunks so that no chunk has tokens of two segments, or says
which tokens of a chunk belong to one segment."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


@dataclass(frozen=True)
class ChunkPacking:
    """Places for the tokens of a batch of packed rows, with a new chunk for every segment."""

    segments: Int[Array, "B chunks"]  # each chunk's segment; a chunk without tokens names any
    slots: Int[Array, "B T"]  # a token's place in [chunks * C]; out of range for padding
    chunk: int

    def scatter(self, tokens: Array) -> Array:
        """Scatters [B, T, ...] to [B, chunks * C, ...], with zeros in places without a token."""
        room = self.segments.shape[1] * self.chunk

        def one(slots: Array, row: Array) -> Array:
            return jnp.zeros((room, *row.shape[1:]), row.dtype).at[slots].set(row, mode="drop", unique_indices=True)

        return jax.vmap(one)(self.slots, tokens)

    def gather(self, placed: Array) -> Array:
        """Gathers the tokens that `scatter` placed, with zeros where a token is padding."""
        return jax.vmap(lambda slots, row: row.at[slots].get(mode="fill", fill_value=0))(self.slots, placed)


def pack_chunks(segment_ids: Int[Array, "B T"], num_segments: int, chunk: int) -> ChunkPacking:
    """Assigns places to the tokens of rows whose ids do not decrease, apart from -1 for padding.

    There are ceil(T / C) + num_segments - 1 chunks, the most that can be needed.
    """
    tokens = segment_ids.shape[1]
    ids = jnp.arange(num_segments)
    belongs = segment_ids[:, :, None] == ids
    counts = jnp.sum(belongs, axis=1)
    first_chunk = jnp.cumsum(-(-counts // chunk), axis=1) - -(-counts // chunk)
    valid = segment_ids >= 0
    index = jnp.maximum(segment_ids, 0)
    rank = jnp.cumsum(valid, axis=1) - 1 - jnp.take_along_axis(jnp.cumsum(counts, axis=1) - counts, index, axis=1)
    chunks = -(-tokens // chunk) + num_segments - 1
    # Padding: a place of its own for each, past the end, so that the places stay unique.
    beyond = chunks * chunk + jnp.arange(tokens)
    slots = jnp.where(valid, jnp.take_along_axis(first_chunk, index, axis=1) * chunk + rank, beyond)
    holders = jnp.sum(jnp.arange(chunks)[None, :, None] >= first_chunk[:, None, :], axis=-1) - 1
    return ChunkPacking(holders, slots, chunk)


def share_chunks(segment_ids: Int[Array, "B T"], chunk: int) -> Int[Array, "B T"]:
    """Returns each token's segment, counted from that of the last token before its chunk: 0 continues that segment.

    Ids do not decrease, apart from -1 for padding, which counts to the segment before it.
    """
    owners = lax.cummax(segment_ids, axis=1)
    ends = owners[:, chunk - 1 :: chunk]
    before = jnp.concatenate([owners[:, :1], ends], axis=1)
    return owners - jnp.repeat(before, chunk, axis=1)[:, : owners.shape[1]]
