"""Latent attention in plain JAX: online softmax over blocks of keys, never the whole score matrix.

Prefill scans query blocks and, inside, key blocks, skipping pairs of blocks where no query sees a key; checkpointing
makes the backward pass recompute a query block's scores. Decode reads as many pages as the longest sequence of the
batch has.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.mla_attention.merge import pack_partials
from pallas_kernels.mla_attention.online import RunningSoftmax, attend, empty, finish

# A block's size in queries and in keys.
QUERIES, KEYS = 256, 512
# The same on a CPU where the keys are those of the queries' own tokens: a pair of small blocks costs no more there for
# each score, and causality and segments hide most pairs (all but an eighth of eight packed prompts of 64 tokens).
CPU_QUERIES, CPU_KEYS = 64, 64


def mla_prefill(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    q_positions: Int[Array, "B S"],
    kv_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    scale: float,
    return_max: bool = False,
) -> tuple[Array, ...]:
    """See `api.mla_prefill`; returns the output in v's dtype, the float32 log-sum-exp, and with `return_max` the
    largest scores [B, H]."""
    arrays = (q, k, v, q_positions, kv_positions, q_segments, kv_segments)
    large = partial(_prefill, scale=scale, return_max=return_max, sizes=(QUERIES, KEYS))
    if q.shape[1] != k.shape[1]:
        return large(*arrays)
    small = partial(_prefill, scale=scale, return_max=return_max, sizes=(CPU_QUERIES, CPU_KEYS))
    return lax.platform_dependent(*arrays, cpu=small, default=large)


def _prefill(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    q_positions: Int[Array, "B S"],
    kv_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B S"],
    kv_segments: Int[Array, "B T"],
    *,
    scale: float,
    return_max: bool,
    sizes: tuple[int, int],
) -> tuple[Array, ...]:
    """Computes `mla_prefill` in blocks of so many queries and keys."""
    of_queries, of_keys = sizes
    queries = (
        _blocks(_heads_first(q), of_queries, 2),
        _blocks(q_positions, of_queries, 1),
        _blocks(q_segments, of_queries, 1, -1),
    )
    keys = tuple(_blocks(_heads_first(array), of_keys, 2) for array in (k, v))
    key_marks = (_blocks(kv_positions, of_keys, 1), _blocks(kv_segments, of_keys, 1, -1))
    (batch, tokens, heads, _), width = q.shape, v.shape[-1]

    @jax.checkpoint
    def query_block(_: None, block: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
        q, *query_marks = block

        @jax.checkpoint
        def key_block(running: RunningSoftmax, block: tuple[Array, ...]) -> tuple[RunningSoftmax, None]:
            k, v, *key_marks = block
            visible = _visible(*query_marks, *key_marks)

            def see(running: RunningSoftmax) -> RunningSoftmax:
                # A key that no query here may see can hold anything: 0 * NaN is NaN.
                used = jnp.any(visible, axis=1)[:, None, :, None]
                scores = scale * jnp.einsum(
                    "bhsd,bhtd->bhst",
                    q,
                    jnp.where(used, k, 0),
                    precision=lax.Precision.HIGHEST,
                    preferred_element_type=jnp.float32,
                )
                scores = jnp.where(visible[:, None], scores, -jnp.inf)
                return attend(running, scores, jnp.where(used, v, 0), "bhst,bhtd->bhsd")

            return lax.cond(jnp.any(visible), see, lambda running: running, running), None

        running, _ = lax.scan(key_block, empty((batch, heads, q.shape[2]), width), (*keys, *key_marks))
        out, lse = finish(running)
        return None, (out.astype(v.dtype), lse, *((jnp.max(running.top, axis=-1),) if return_max else ()))

    _, (out, lse, *top) = lax.scan(query_block, None, queries)
    out, lse = rearrange(out, "n b h s d -> b (n s) h d"), rearrange(lse, "n b h s -> b (n s) h")
    return out[:, :tokens], lse[:, :tokens], *(jnp.max(block, axis=0) for block in top)


def mla_decode(
    q: Float[Array, "B H width"],
    cache: Float[Array, "pages width page"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, "B"] | Int[Array, "B T"],
    *,
    latent: int,
    scale: float,
    shards: int | None,
) -> Array | tuple[Float[Array, "B H L"], Float[Array, "B H"]]:
    """See `api.mla_decode`; without `shards` returns the output in q's dtype and the float32 log-sum-exp.

    With lengths [B, T], row r of H is a query of token r modulo T.
    """
    (batch, heads, _), page = q.shape, cache.shape[2]
    longest = lengths if lengths.ndim == 1 else jnp.max(lengths, axis=1)

    # A page at a time: both products then contract contiguous pages, without a copy.
    def attend_page(i: Array, running: RunningSoftmax) -> RunningSoftmax:
        chosen = lax.dynamic_index_in_dim(page_table, i, axis=1, keepdims=False)
        token = i * page + jnp.arange(page)
        within = token < longest[:, None]
        # Tokens past a length, or in a page that the table should not name, can hold anything: 0 * NaN is NaN.
        tokens = jnp.where(within[:, None], cache.at[chosen].get(mode="clip"), 0).astype(q.dtype)
        scores = scale * jnp.einsum(
            "bhc,bcp->bhp", q, tokens, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        seen = within[:, None]
        if lengths.ndim == 2:
            seen = token < jnp.tile(lengths, (1, heads // lengths.shape[1]))[:, :, None]
        return attend(running, jnp.where(seen, scores, -jnp.inf), tokens[:, :latent], "bhp,blp->bhl")

    pages = -(-jnp.max(lengths, initial=0) // page)
    out, lse = finish(lax.fori_loop(0, pages, attend_page, empty((batch, heads), latent)))
    return (out.astype(q.dtype), lse) if shards is None else pack_partials(out, lse, shards)


def mla_write(
    cache: Float[Array, "pages width page"],
    latents: Float[Array, "B S width"],
    page_table: Int[Array, "B max_pages"],
    positions: Int[Array, "B S"],
) -> Float[Array, "pages width page"]:
    """See `api.mla_write`."""
    num_pages, _, page = cache.shape
    entry = positions // page
    listed = (positions >= 0) & (entry < page_table.shape[1])
    chosen = jnp.take_along_axis(page_table, jnp.where(listed, entry, 0), axis=1)
    # Past the end, where the scatter drops it: a negative index would count from the end.
    chosen = jnp.where(listed & (chosen >= 0), chosen, num_pages)
    return cache.at[chosen, :, positions % page].set(latents.astype(cache.dtype), mode="drop")


def _heads_first(array: Float[Array, "B S H D"]) -> Float[Array, "B H S D"]:
    # Once for all blocks: batched products want the heads outside.
    return jnp.moveaxis(array, 2, 1)


def _blocks(array: Array, block: int, axis: int, fill: int = 0) -> Array:
    """Cuts `axis` in blocks, numbered by a new leading axis, and pads the last one."""
    size = min(block, max(1, array.shape[axis]))
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % size)
    padded = jnp.pad(array, padding, constant_values=fill)
    cut = padded.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _visible(
    q_positions: Int[Array, "B s"],
    q_segments: Int[Array, "B s"],
    kv_positions: Int[Array, "B t"],
    kv_segments: Int[Array, "B t"],
) -> Bool[Array, "B s t"]:
    earlier = kv_positions[:, None, :] <= q_positions[:, :, None]
    return earlier & (kv_segments[:, None, :] == q_segments[:, :, None]) & (q_segments >= 0)[:, :, None]
