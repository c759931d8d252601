"""Several sequences in one row: which chunk each token goes to, when no chunk may hold tokens of two segments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch of packed rows lie once every segment begins a chunk."""

    segments: Int[Array, "B chunks"]  # whose tokens a chunk holds; a chunk without tokens names any segment
    slots: Int[Array, "B T"]  # a token's place in [chunks * C]; out of range for padding
    chunk: int

    def place(self, tokens: Array) -> Array:
        """[B, T, ...] -> [B, chunks * C, ...] with zeros in places without a token."""
        room = self.segments.shape[1] * self.chunk

        def one(slots: Array, row: Array) -> Array:
            return jnp.zeros((room, *row.shape[1:]), row.dtype).at[slots].set(row, mode="drop", unique_indices=True)

        return jax.vmap(one)(self.slots, tokens)

    def collect(self, placed: Array) -> Array:
        """The inverse of `place`; zeros where a token is padding."""
        return jax.vmap(lambda slots, row: row.at[slots].get(mode="fill", fill_value=0))(self.slots, placed)


def chunk_layout(segment_ids: Int[Array, "B T"], num_segments: int, chunk: int) -> Layout:
    """The layout of rows whose ids, -1 for padding apart, do not decrease.

    At most ceil(T / C) + num_segments - 1 chunks are needed; that many there are.
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
    return Layout(holders, slots, chunk)
