"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): expanded for prefill, absorbed over a paged cache.

The cache is [pages, width, page] with width = latent + rope (512 + 64 in Kimi's models) and `page` tokens to a page:
tokens are along the last axis, for a row-major width of 576 would be padded to 640 on TPU.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.checks import bind_shapes, check_dtype, checks_arguments, known
from pallas_kernels.dispatch import Backend, choose
from pallas_kernels.mla_attention import mosaic_prefill, mosaic_tpu, mosaic_write, triton, triton_prefill, xla

_WRITE = (
    Backend("mosaic_tpu", mosaic_write.mla_write, ("tpu",), mosaic_write.unsupported),
    Backend("xla", xla.mla_write),
)


@checks_arguments
def mla_prefill(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H Dv"],
    *,
    q_positions: Int32[Array, "B S"],
    kv_positions: Int32[Array, "B T"],
    q_segments: Int32[Array, "B S"] | None = None,
    kv_segments: Int32[Array, "B T"] | None = None,
    scale: float,
    return_lse: bool = False,
    return_max: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, ...]:
    """Computes softmax attention where kv_position <= q_position and segments agree.

    The score matrix [S, T] is never formed.

    Args:
      q: [B, S, H, D] (D = 192 in Kimi's models); k: [B, T, H, D]; v: [B, T, H, Dv] (128). Any widths, one dtype.
      q_positions, kv_positions: int32 [B, S] and [B, T]. If all are equal, the attention is bidirectional.
      q_segments, kv_segments: int32 [B, S] and [B, T], both or neither; a negative id is padding, which neither
        sees nor is seen.
      scale: multiplies the scores before the softmax.
      return_lse: also returns the natural log-sum-exp of the scores, by which partial attentions can be merged.
      return_max: also returns, last, the largest scaled score of each head.
      implementation: "mosaic_tpu", "triton" (D and Dv at most 256), "xla", or None for the best that the platform has.

    Returns:
      [B, S, H, Dv] in v's dtype (softmax and accumulation in float32), and with `return_lse` float32 [B, S, H], of the
      weights that multiply v (on a TPU rounded to its dtype). With `return_max` also float32 [B, H], over all queries
      and the keys that they see, -inf where there is none; no gradient flows through it.
      A query that sees no key gets zeros and -inf. Keys that no query sees may hold anything. Differentiable in q, k
      and v.

    Raises:
      ValueError: shapes or dtypes other than these, or segments on one side only.
    """
    op = "mla_prefill"
    if (q_segments is None) != (kv_segments is None):
        raise ValueError(f"{op}: q_segments and kv_segments go together, found one of them only")
    bind_shapes(
        op,
        q=(q, "B S H D"),
        k=(k, "B T H D"),
        v=(v, "B T H Dv"),
        q_positions=(q_positions, "B S"),
        kv_positions=(kv_positions, "B T"),
        **({} if q_segments is None else {"q_segments": (q_segments, "B S"), "kv_segments": (kv_segments, "B T")}),
    )
    check_dtype(op, "q", q, jnp.floating)
    check_dtype(op, "k", k, jnp.result_type(q))
    check_dtype(op, "v", v, jnp.result_type(q))
    for name, array in (("q_positions", q_positions), ("kv_positions", kv_positions)):
        check_dtype(op, name, array, jnp.integer)
    if q_segments is None or kv_segments is None:
        q_segments, kv_segments = jnp.zeros_like(q_positions), jnp.zeros_like(kv_positions)
    operands = tuple(map(jnp.asarray, (q, k, v, q_positions, kv_positions, q_segments, kv_segments)))
    options: dict[str, Any] = {"scale": scale, "return_max": return_max}
    backends = (
        Backend("mosaic_tpu", partial(mosaic_prefill.mla_prefill, **options), ("tpu",), mosaic_prefill.unsupported),
        Backend("triton", partial(triton_prefill.mla_prefill, **options), ("cuda",), triton_prefill.unsupported),
        Backend("xla", partial(xla.mla_prefill, **options)),
    )
    out, lse, *top = choose(op, implementation, backends, *operands)(*operands)
    if not return_lse and not return_max:
        return out
    return (out, *((lse,) if return_lse else ()), *top)


@checks_arguments
def mla_decode(
    q: Float[Array, "B H width"] | Float[Array, "B H T width"],
    cache: Float[Array, "pages width page"],
    page_table: Int32[Array, "B max_pages"],
    lengths: Int32[Array, "B"] | Int32[Array, "B T"],
    *,
    latent: int,
    scale: float,
    return_lse: bool = False,
    shards: int | None = None,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """Attends from the newest tokens of each sequence to its cached latents: softmax(scale * q . [c | k_rope]) c.

    Args:
      q: [B, H, L + R], queries already multiplied into the latent space (L = 512), then their rotated channels (64).
        With several tokens of a sequence, to verify drafts, [B, H, T, L + R]: all of them read a cached latent once.
      cache: [pages, L + R, page], latents first.
      page_table: int32 [B, max_pages]; entry i of a row is the page of that sequence's tokens [i * page, (i + 1) *
        page).
      lengths: int32 [B], tokens of each sequence, the newest included; or [B, T], the tokens that each query sees.
      latent: L.
      scale, return_lse, implementation: as in `mla_prefill`; there is also "triton" (L, R and page powers of two).
      shards: packs the result for as many devices, each of which merges some heads' attentions over several caches.

    Returns:
      [B, H, L] or [B, H, T, L] in q's dtype (softmax and accumulation in float32), and with `return_lse` float32 [B, H]
      or [B, H, T]. A query that sees no token gets zeros and -inf. Table entries, and cache past what a sequence's
      queries see, may hold anything. Not differentiable.
      With `shards` (S) instead one array, float32 [S, B, H / S, L + 1] or [S, B, H / S, T, L + 1]: H / S heads after
      another, each output without rounding and, last, its log-sum-exp. `mla_output` takes what devices exchange of it.

    Raises:
      ValueError: shapes or dtypes other than these, or (where the values are known) a length below 0 or beyond the
        table, or a page out of range.
    """
    op = "mla_decode"
    axes, rows = ("B H", "B") if jnp.ndim(q) == 3 else ("B H T", "B T")
    sizes = bind_shapes(op, q=(q, f"{axes} width"), lengths=(lengths, rows))
    bind_shapes(op, q=(q, f"{axes} width"), cache=(cache, "pages width page"))
    bind_shapes(op, page_table=(page_table, f"{sizes['B']} max_pages"))
    if not 0 < latent <= sizes["width"]:
        raise ValueError(f"{op}: latent is {latent}, expected 1 to {sizes['width']}, the width of queries")
    if shards is not None and (shards < 1 or sizes["H"] % shards):
        raise ValueError(f"{op}: shards is {shards}, expected a divisor of {sizes['H']} heads")
    for name, array in (("q", q), ("cache", cache)):
        check_dtype(op, name, array, jnp.floating)
    for name, array in (("page_table", page_table), ("lengths", lengths)):
        check_dtype(op, name, array, jnp.integer)
    if (seen := known(lengths)) is not None and seen.ndim == 2:  # of each sequence the most, or what is below 0
        seen = np.where((seen < 0).any(axis=1), seen.min(axis=1, initial=0), seen.max(axis=1, initial=0))
    _check_pages(op, cache, page_table, seen)
    operands = tuple(map(jnp.asarray, (_by_sequence(q), cache, page_table, lengths)))
    if sizes.get("T") == 1:
        operands = (*operands[:3], operands[3][:, 0])
    options: dict[str, Any] = {"latent": latent, "scale": scale, "shards": shards}
    backends = (
        Backend(
            "mosaic_tpu",
            partial(mosaic_tpu.mla_decode, **options),
            ("tpu",),
            partial(mosaic_tpu.unsupported, latent=latent),
        ),
        Backend("triton", partial(triton.mla_decode, **options), ("cuda",), partial(triton.unsupported, latent=latent)),
        Backend("xla", partial(xla.mla_decode, **options)),
    )
    found = choose(op, implementation, backends, *operands)(*operands)
    shape = jnp.shape(q)[:-1]
    if shards is not None:
        return found.reshape(shards, shape[0], shape[1] // shards, *shape[2:], latent + 1)
    out, lse = found
    out, lse = out.reshape(*shape, latent), lse.reshape(shape)
    return (out, lse) if return_lse else out


def _by_sequence(q: Any) -> Array:
    """Returns queries as rows of their sequence, [B, H * T, width], of which row r is of token r modulo T."""
    return jnp.asarray(q) if jnp.ndim(q) == 3 else jnp.reshape(q, (len(q), -1, jnp.shape(q)[-1]))


@checks_arguments
def mla_write(
    cache: Float[Array, "pages width page"],
    latents: Float[Array, "B width"] | Float[Array, "B S width"],
    page_table: Int32[Array, "B max_pages"],
    positions: Int32[Array, "B"] | Int32[Array, "B S"],
) -> Float[Array, "pages width page"]:
    """Writes new rows into their pages of the cache: row (b, s) becomes token positions[b, s] of sequence b.

    Args:
      cache: [pages, width, page]; donate it to the jitted step that calls this, and it is written in place.
      latents: [B, width], one row per sequence, or [B, S, width]; cast to the cache's dtype.
      page_table: int32 [B, max_pages].
      positions: int32 [B] or [B, S]. A row with a negative position is dropped (padding of a batch of unequal lengths),
        and so is, where values are not known, one whose page is out of range.

    Raises:
      ValueError: shapes or dtypes other than these, or (where the values are known) a position beyond the table or a
        page out of range.
    """
    op = "mla_write"
    single = jnp.ndim(latents) == 2
    rows = "B width" if single else "B S width"
    bind_shapes(
        op,
        cache=(cache, "pages width page"),
        latents=(latents, rows),
        page_table=(page_table, "B max_pages"),
        positions=(positions, rows.removesuffix(" width")),
    )
    check_dtype(op, "cache", cache, jnp.floating)
    check_dtype(op, "latents", latents, jnp.floating)
    for name, array in (("page_table", page_table), ("positions", positions)):
        check_dtype(op, name, array, jnp.integer)
    if single:
        latents, positions = latents[:, None], positions[:, None]
    places = known(positions)
    _check_pages(op, cache, page_table, None if places is None else places.max(axis=1, initial=-1) + 1)
    operands = tuple(map(jnp.asarray, (cache, latents, page_table, positions)))
    return choose(op, None, _WRITE, *operands)(*operands)


@checks_arguments
def _check_pages(op: str, cache: Array, page_table: Array, lengths: np.ndarray | None) -> None:
    table, (pages, _, page) = known(page_table), jnp.shape(cache)
    if table is None or lengths is None or not lengths.size:
        return
    if lengths.min() < 0:
        raise ValueError(f"{op}: a sequence has {lengths.min()} tokens, expected 0 or more")
    if lengths.max() > table.shape[1] * page:
        raise ValueError(
            f"{op}: a sequence has {lengths.max()} tokens, expected at most {table.shape[1]} pages of {page}"
        )
    used = table[np.arange(table.shape[1]) < -(-lengths[:, None] // page)]
    if used.size and not (used.min() >= 0 and used.max() < pages):
        raise ValueError(f"{op}: page_table names pages {used.min()} to {used.max()}, expected 0 to {pages - 1}")
