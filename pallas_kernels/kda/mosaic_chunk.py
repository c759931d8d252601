"""The part of a visit that the chunk kernel and its gradient share: a chunk's operands, decays and decayed products.

A visit is a chunk of 64 tokens and one of the segments in it (`visits`). Tokens of other segments, and padding, enter
as zeros, with which a chunk leaves the state as it is.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import LANES
from pallas_kernels.kda.mosaic_blocks import CHUNK, split_heads


class KdaTiling(NamedTuple):
    """Heads of a step and of a pack, tokens of a base block (`mosaic_scores.base_block`), and options of `api.kda`."""

    heads: int
    pack: int
    base: int
    normalize_qk: bool
    scale: float

    @property
    def packs(self) -> int:
        """The packs of a step."""
        return self.heads // self.pack

    def lanes(self, ref: Any, p: int) -> slice:
        """Returns the lanes of pack p in a block [64, heads * width]."""
        width = ref.shape[1] // self.heads * self.pack
        return slice(p * width, (p + 1) * width)


def heads_per_step(total: int, Dk: int, Dv: int, most_channels: int) -> int:
    """Returns the number of heads, out of `total`, that a grid step takes: `most_channels` of keys and values."""
    return max(n for n in range(1, total + 1) if total % n == 0 and (n == 1 or n * (Dk + Dv) <= most_channels))


def marks(
    beta: Float[Array, "B T H"], segment_ids: Int[Array, "B T"], tiling: KdaTiling
) -> Float[Array, "B groups chunks rows P64"]:
    """Returns, for each chunk, a row of betas of each pack and a row of segment ids (float32, exact up to 2^24).

    Tokens are along the lanes: columns would be padded to 128 lanes in memory.
    """
    batch, tokens, total = beta.shape
    groups, chunks = total // tiling.heads, -(-tokens // CHUNK)
    padding = [(0, 0), (0, chunks * CHUNK - tokens)]
    betas = jnp.pad(beta.astype(jnp.float32), [*padding, (0, 0)])
    betas = betas.reshape(batch, chunks, CHUNK, groups, -1, tiling.pack).transpose(0, 3, 1, 4, 5, 2)
    ids = jnp.pad(segment_ids, padding, constant_values=-1).astype(jnp.float32)
    ids = jnp.broadcast_to(ids.reshape(batch, 1, chunks, 1, 1, CHUNK), (batch, groups, chunks, 1, tiling.pack, CHUNK))
    return jnp.concatenate([betas, ids], axis=3).reshape(batch, groups, chunks, -1, tiling.pack * CHUNK)


def write_segments(marks: Any, work: Any, tiling: KdaTiling) -> None:
    """Writes each token's segment to scratch."""
    work.ids[...] = jnp.broadcast_to(marks[tiling.packs :], (LANES, marks.shape[1])).T[:CHUNK]


def read_operands(
    p: int, own: Array, q: Any, k: Any, g: Any, work: Any, tiling: KdaTiling
) -> tuple[Float[Array, "64 PD"], Float[Array, "64 PD"], Float[Array, "64 PD"]]:
    """Returns a pack's keys, queries and log decays."""
    keys, queries, decay = (segment_rows(ref, p, own, work, tiling) for ref in (k, q, g))
    if tiling.normalize_qk:
        keys, queries = (_normalized(array, tiling.pack) for array in (keys, queries))
    return keys, tiling.scale * queries, decay


def stagger(packs: list[Iterator[None]]) -> None:
    """Runs the packs' parts, from one yield to the next, each pack a part behind the one before it.

    A part's products then have the time of other packs' parts to come back, and few packs are begun at once.
    """
    waiting, done = iter(packs), object()
    begun: list[Iterator[None]] = []
    while (new := [*islice(waiting, 1)]) or begun:
        begun = [pack for pack in new + begun if next(pack, done) is not done]


def beta_columns(p: int, own: Array, marks: Any, tiling: KdaTiling) -> list[Float[Array, "64 128"]]:
    """Returns the betas of each head of a pack, along the rows."""
    lanes = marks.shape[1]
    columns = jnp.broadcast_to(betas(p, own, marks, tiling), (max(lanes, LANES), lanes)).T
    return [columns[h * CHUNK : (h + 1) * CHUNK] for h in range(tiling.pack)]


def side_by_side(heads: list[Float[Array, "64 128"]]) -> Float[Array, "64 P64"]:
    """Returns 64 lanes of each head, for arrays whose lanes are alike."""
    shape = (CHUNK, len(heads) * CHUNK)
    head = lax.broadcasted_iota(jnp.int32, shape, 1) // CHUNK
    out = heads[0][:, : shape[1]]
    for h, array in enumerate(heads[1:], 1):
        out = jnp.where(head == h, array, out)
    return out


def betas(p: int, own: Array, marks: Any, tiling: KdaTiling) -> Float[Array, "1 P64"]:
    """Returns a pack's betas, with zeros for tokens of other segments."""
    return jnp.where(marks[tiling.packs :] == own.astype(jnp.float32), marks[p : p + 1], 0)


def segment_rows(ref: Any, p: int, own: Array, work: Any, tiling: KdaTiling) -> Float[Array, "64 PD"]:
    """Returns a pack's rows in float32, with zeros for tokens of other segments."""
    x = ref[:, tiling.lanes(ref, p)].astype(jnp.float32)
    return keep_segment(x, own, work)


def keep_segment(x: Float[Array, "64 D"], own: Array, work: Any) -> Float[Array, "64 D"]:
    """Returns the rows with zeros for tokens of other segments."""
    ids = jnp.concatenate([work.ids[...]] * (x.shape[1] // LANES), axis=1)
    return jnp.where(ids == own.astype(jnp.float32), x, 0)


def _normalized(x: Float[Array, "64 PD"], pack: int) -> Float[Array, "64 PD"]:
    heads = [y * lax.rsqrt(jnp.sum(y * y, axis=1, keepdims=True) + 1e-6) for y in split_heads(x, pack)]
    return jnp.concatenate(heads, axis=1)
