"""The tokens of a call and the caches that mixers continue from: pages of latents and slots of recurrent states.

An MLA layer keeps the compressed latents of every token, in pages (`pallas_kernels.mla_attention`): `kv_lora_rank +
qk_rope_head_dim` values a token, never expanded heads. A KDA layer keeps its float32 state and the raw projections of
the last `short_conv_kernel_size - 1` tokens. Pages and slots have no owner here: a `Context` says which of them a
sequence uses in this call.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.axes import Array, Float, Float32, Int32, PageTable, Positions
from sharding import Partition, StreamLayout

# Tokens of a page: what the TPU kernels read at once, and a multiple of every chunk of the delta rule.
PAGE = 128

# A decode step takes one token of each sequence, in the forms that read a cache least; prefill takes any number. A
# verification is a decode step of a few tokens of each sequence, of which the last may turn out not to be its own.
Phase = Literal["prefill", "decode", "verify"]


class MLACache(NamedTuple):
    """Pages of latents, channels major: a row of 576 would be padded to 640 on a TPU."""

    pages: Float[Array, "pages c page"]


class KDAState(NamedTuple):
    """`tail` has the last raw projections q, k and v (before convolution and SiLU), side by side; `S` is keys x
    values."""

    tail: Float[Array, "slots taps channels"]
    S: Float32[Array, "slots h k v"]


class KDADraft(NamedTuple):
    """Holds what a verification's tokens would change a state by: `raw` as in `KDAState.tail`, and the arguments of the
    delta rule. The state stays as it was until it is known which of the tokens are right (`kda.take_in`)."""

    raw: Float[Array, "b t channels"]
    k: Float[Array, "b t h k"]
    v: Float[Array, "b t h v"]
    g: Float32[Array, "b t h k"]
    beta: Float32[Array, "b t h"]


# A verification returns a `KDADraft` for each `KDAState` that it is given.
LayerCache = MLACache | KDAState | KDADraft


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Describes the tokens of one call, for every layer alike. The rows of tokens hold n sequences each.

    positions: int32 [rows, t], each token's place in its sequence; -1 is padding, which nothing sees.
    page_table: int32 [rows * n, row_pages], the pages of each sequence in order; None where nothing is cached. Several
        sequences may name a page that none of them writes. On a mesh a device's part of the table numbers the pages of
        its own part of the pool, and a sequence's page i is on device i mod S of the `sequence` axis.
    slots: int32 [rows * n], the slot of each sequence's KDA states, -1 for none (what it leaves is dropped); on a mesh
        numbered within the part of the row's device. None: sequence i has slot i, and there are as many of both, so
        that states are used in place.
    segments: int32 [rows, t], the sequence (0 to n - 1, in order) of each token of a packed row, -1 for padding. None:
        a row is one sequence, its padding last.
    phase: "decode" promises t = 1 and no segments, "verify" no segments and no token at position 0.
    num_segments: n, the sequences of each packed row, where nothing is cached.
    """

    positions: Positions
    page_table: PageTable | None = None
    slots: Int32[Array, "sequences"] | None = None
    segments: Positions | None = None
    phase: Phase = dataclasses.field(default="prefill", metadata={"static": True})
    num_segments: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def valid(self) -> jax.Array:
        """Returns a mask of the tokens that are no padding, bool [rows, t]."""
        return self.positions >= 0

    def starts(self) -> Int32[Array, "sequences"]:
        """Returns the position of each sequence's first token of this call, int32 [rows * n]; -1 where it has none."""
        if self.segments is None:
            return self.positions[:, 0]
        member = self.members()
        none = jnp.iinfo(jnp.int32).max
        first = jnp.min(jnp.where(member, self.positions[:, None], none), axis=-1)
        return jnp.where(first == none, -1, first).reshape(-1)

    def last(self) -> Int32[Array, "sequences"]:
        """Returns the column of each sequence's last token of this call, int32 [rows * n]; 0 where it has none."""
        columns = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
        if self.segments is None:
            return jnp.max(jnp.where(self.valid, columns, 0), axis=-1)
        return jnp.max(jnp.where(self.members(), columns, 0), axis=-1).reshape(-1)

    def members(self) -> jax.Array:
        """Returns a mask of each sequence's tokens, bool [rows, n, t]."""
        assert self.segments is not None
        rows = len(self.positions)
        sequences = self.page_table.shape[0] // rows if self.page_table is not None else self.num_segments
        return (self.segments[:, None] == jnp.arange(sequences)[:, None]) & self.valid[:, None]


def read_slots(pool: KDAState, context: Context) -> KDAState:
    """Reads the states that a call's sequences begin with, [rows * n, ...].

    A sequence whose first token of this call has position 0 begins with an empty state, whatever is in its slot. A
    decode step reads states unchanged: a sequence's first token belongs to prefill, or to a slot that is clear.
    """
    rows, slots = pool, context.slots
    if slots is not None:
        rows = jax.tree.map(lambda x: x.at[jnp.maximum(slots, 0)].get(mode="clip"), pool)
    if context.phase != "prefill":
        return rows
    begins = context.starts() == 0
    return jax.tree.map(lambda x: jnp.where(begins.reshape(-1, *(1,) * (x.ndim - 1)), 0, x), rows)


def write_slots(pool: KDAState, rows: KDAState, context: Context) -> KDAState:
    """Writes the states that a call's sequences end with into their slots of the pool."""
    if context.slots is None:
        return rows
    # past the end, where the scatter drops it: a negative index would count from the end
    slots = jnp.where(context.slots >= 0, context.slots, pool.S.shape[0])
    return jax.tree.map(lambda x, new: x.at[slots].set(new, mode="drop"), pool, rows)


def cache_specs(layers: tuple[LayerCache | None, ...], partition: Partition) -> Any:
    """Returns the PartitionSpec of every array of the layers' caches."""
    mla: Any = MLACache(("pages", None, None))  # type: ignore[arg-type]
    kda: Any = KDAState(("batch", None, "kda_heads"), ("batch", "kda_heads", None, None))  # type: ignore[arg-type]
    axes = tuple(None if cached is None else mla if isinstance(cached, MLACache) else kda for cached in layers)
    return partition.tree_specs(layers, axes)


def draft_spec(layout: StreamLayout) -> Any:
    """Returns the PartitionSpec of every array of a `KDADraft`."""
    channels: Any = layout.row_spec(None, "kda_heads")
    heads: Any = layout.row_spec(None, "kda_heads", None)
    return KDADraft(channels, heads, heads, heads, channels)
