"""The chunks of a batch of rows, in groups that `xla` computes one after another."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.kda.packing import ChunkPacking, pack_chunks, share_chunks

CHUNK = 64
# Chunks times heads whose intermediate results exist at one time.
GROUP = 64


class ChunkGroups(NamedTuple):
    """The groups of chunks that a batch of rows is cut into.

    Either no chunk has tokens of two segments, or the segments of a chunk share it, each beginning with an empty state.
    """

    packing: ChunkPacking | None  # of packed rows whose segments do not share chunks
    valid: Bool[Array, "B T"] | None  # of packed rows whose segments do
    tokens: int
    chunks: int  # the last group may have room for more
    segments: Int[Array, "groups chunks B"]  # each chunk's segment; a chunk without tokens may name any
    owners: Int[Array, "groups B t"] | None  # where chunks are shared: each token's segment, counted as `share_chunks`

    @classmethod
    def make(
        cls,
        beta: Float[Array, "B T H"],
        states: Float[Array, "B N H Dk Dv"],
        segment_ids: Int[Array, "B T"] | None,
        outputs_only: bool,
    ) -> "ChunkGroups":
        batch, tokens, heads = beta.shape
        shared = outputs_only and segment_ids is not None
        packing = None if segment_ids is None or shared else pack_chunks(segment_ids, states.shape[1], CHUNK)
        chunks = -(-tokens // CHUNK) if packing is None else packing.segments.shape[1]
        count = -(-chunks // max(1, GROUP // (batch * heads)))
        size = -(-chunks // count)
        segments = jnp.zeros((batch, chunks), jnp.int32) if packing is None else packing.segments
        segments = jnp.pad(segments, ((0, 0), (0, count * size - chunks)))
        segments = rearrange(segments, "b (n m) -> n m b", n=count)
        if segment_ids is None or not shared:
            return cls(packing, None, tokens, chunks, segments, None)
        owners = jnp.pad(share_chunks(segment_ids, CHUNK), ((0, 0), (0, count * size * CHUNK - tokens)))
        owners = rearrange(owners, "b (n t) -> n b t", n=count)
        return cls(None, segment_ids >= 0, tokens, chunks, segments, owners)

    def carried(self, states: Float[Array, "B N H Dk Dv"]) -> Float[Array, "B n H Dk Dv"]:
        """Returns the states that go from one group to the next: one a row where segments share chunks."""
        return states if self.valid is None else states[:, :1]

    def split(self, array: Float[Array, "B T *rest"]) -> Float[Array, "groups B t *rest"]:
        """Splits tokens into groups, with zeros in places without a token."""
        count, size, _ = self.segments.shape
        placed = self._zero_padding(array) if self.packing is None else self.packing.scatter(array)
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, count * size * CHUNK - placed.shape[1])
        return rearrange(jnp.pad(placed, padding), "b (n t) ... -> n b t ...", n=count)

    def join(self, array: Float[Array, "groups B t *rest"]) -> Float[Array, "B T *rest"]:
        """Joins the groups that `split` made, with zeros where a token is padding."""
        placed = rearrange(array, "n b t ... -> b (n t) ...")
        return self._zero_padding(placed[:, : self.tokens]) if self.packing is None else self.packing.gather(placed)

    def _zero_padding(self, array: Float[Array, "B T *rest"]) -> Float[Array, "B T *rest"]:
        if self.valid is None:
            return array
        return jnp.where(self.valid.reshape(*self.valid.shape, *(1,) * (array.ndim - 2)), array, 0)

    def join_states(self, states: Float[Array, "groups m B H Dk Dv"], room: int) -> Float[Array, "B room H Dk Dv"]:
        """Joins the states before the chunks of each group, followed by zeros."""
        joined = rearrange(states, "n m b ... -> b (n m) ...")[:, : self.chunks]
        return jnp.pad(joined, ((0, 0), (0, room - self.chunks), (0, 0), (0, 0), (0, 0)))

    def first_states(self, states: Float[Array, "B room H Dk Dv"]) -> Float[Array, "groups B H Dk Dv"]:
        """Returns the states before each group's first chunk, of those that `join_states` returned."""
        count, size, _ = self.segments.shape
        padding = [(0, 0)] * states.ndim
        padding[1] = (0, count * size - self.chunks)
        return rearrange(jnp.pad(states[:, : self.chunks], padding), "b (n m) ... -> m n b ...", n=count)[0]
