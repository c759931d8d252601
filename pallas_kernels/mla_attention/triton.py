"""Attention from the newest tokens of each sequence over the paged cache, as two Pallas kernels for NVIDIA GPUs (Triton
compiles). Several tokens of a sequence (drafts to verify) are more rows of heads, row r of token r modulo T.

A sequence's tokens are divided evenly among several programs, for one sequence alone would keep few multiprocessors
busy. The first kernel attends to a share of the tokens with up to 32 heads at once, which read each latent once, for
scores and for values; the second merges the shares by their log-sum-exps (arXiv 2205.14135, section 3.1).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_attention.merge import pack_partials

# Heads of a program (a matrix product has 16 rows at least), and tokens of a turn.
FEWEST_HEADS, MOST_HEADS, MOST_TOKENS = 16, 32, 32
# Programs that keep every multiprocessor of a large GPU busy, and the fewest tokens worth a program of their own.
PROGRAMS, SHARE = 256, 256


def unsupported(q: Array, cache: Array, page_table: Array, lengths: Array, *, latent: int) -> str | None:
    """Says why the kernels cannot take these shapes and dtypes; None where they can."""
    rope, page = q.shape[-1] - latent, cache.shape[2]
    if any(not _is_power_of_two(n) or n < 16 for n in (latent, rope, page)):
        return f"latent, rope and page are {latent}, {rope} and {page}, expected powers of two from 16"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q is {q.dtype}, expected bfloat16 or float32"
    if not q.size or not page_table.size:
        return "there are no sequences, heads or pages"
    return None


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def mla_decode(
    q: Float[Array, "B H width"],
    cache: Float[Array, "pages width page"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, "B"] | Int[Array, "B T"],
    *,
    latent: int,
    scale: float,
    shards: int | None,
    interpret: bool = False,
) -> Array | tuple[Float[Array, "B H L"], Float[Array, "B H"]]:
    """See `api.mla_decode`; without `shards` returns the output in q's dtype and the float32 log-sum-exp."""
    (batch, heads, _), page = q.shape, cache.shape[2]
    together = FEWEST_HEADS if heads <= FEWEST_HEADS else MOST_HEADS
    blocks = -(-heads // together)
    wanted = min(-(-PROGRAMS // (batch * blocks)), -(-page_table.shape[1] * page // SHARE))
    shares = 1 << (wanted - 1).bit_length()
    out, lse = pl.pallas_call(
        partial(
            _attend,
            scale=scale,
            together=together,
            tokens=min(MOST_TOKENS, page),
            new_tokens=lengths.size // batch,
        ),
        grid=(blocks, shares, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, shares, heads, latent), jnp.float32),
            jax.ShapeDtypeStruct((batch, shares, heads), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        name="mla_decode",
        interpret=interpret,
    )(q[..., :latent], q[..., latent:], cache, page_table.astype(jnp.int32), lengths.astype(jnp.int32))
    out, lse = pl.pallas_call(
        _merge,
        grid=(heads, batch),
        in_specs=[
            pl.BlockSpec((None, shares, None, latent), lambda h, b: (b, 0, h, 0)),
            pl.BlockSpec((None, shares, None), lambda h, b: (b, 0, h)),
        ],
        out_specs=(
            pl.BlockSpec((None, None, latent), lambda h, b: (b, h, 0)),
            pl.BlockSpec((None, None), lambda h, b: (b, h)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, latent), q.dtype if shards is None else jnp.float32),
            jax.ShapeDtypeStruct((batch, heads), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="mla_merge",
        interpret=interpret,
    )(out, lse)
    return (out, lse) if shards is None else pack_partials(out, lse, shards)


def _attend(
    q_latent_ref: Any,
    q_rope_ref: Any,
    cache_ref: Any,
    table_ref: Any,
    lengths_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    together: int,
    tokens: int,
    new_tokens: int,
) -> None:
    share, b = pl.program_id(1), pl.program_id(2)
    (_, heads, latent), rope, page = q_latent_ref.shape, q_rope_ref.shape[2], cache_ref.shape[2]
    head = pl.program_id(0) * together + jnp.arange(together, dtype=jnp.int32)
    is_head = head < heads

    def query(ref: Any, width: int) -> Array:
        at = ref.at[b, head[:, None], jnp.arange(width, dtype=jnp.int32)[None, :]]
        return plgpu.load(at, mask=is_head[:, None], other=0)

    q_latent, q_rope = query(q_latent_ref, latent), query(q_rope_ref, rope)
    dtype = q_latent.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    multiply = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    seen = lengths_ref[b] if new_tokens == 1 else plgpu.load(lengths_ref.at[b, head % new_tokens])
    length = seen if new_tokens == 1 else jnp.max(seen)
    each = pl.cdiv(pl.cdiv(length, tokens), pl.num_programs(1))
    first, end = share * each, jnp.minimum((share + 1) * each, pl.cdiv(length, tokens))

    def turn(i: Array, running: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, out = running
        chosen, at = table_ref[b, i * tokens // page], i * tokens % page
        within = i * tokens + jnp.arange(tokens, dtype=jnp.int32) < length

        def load(start: int, width: int) -> Array:
            # Tokens past the length can hold anything: 0 * NaN is NaN
            places = cache_ref.at[chosen, pl.ds(start, width), pl.ds(at, tokens)]
            return plgpu.load(places, mask=jnp.broadcast_to(within[None, :], (width, tokens)), other=0).astype(dtype)

        c = load(0, latent)
        scores = scale * (multiply(q_latent, c) + multiply(q_rope, load(latent, rope)))
        visible = within[None, :]
        if new_tokens > 1:
            visible = i * tokens + jnp.arange(tokens, dtype=jnp.int32)[None, :] < seen[:, None]
        scores = jnp.where(visible, scores, -jnp.inf)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        finite = new if new_tokens == 1 else jnp.where(new == -jnp.inf, 0, new)  # a token may see nothing here
        weights, keep = jnp.exp(scores - finite[:, None]), jnp.exp(top - finite)
        return (
            new,
            keep * total + jnp.sum(weights, axis=1),
            keep[:, None] * out + multiply(weights.astype(dtype), c.T),
        )

    zeros = jnp.zeros((together,), jnp.float32)
    empty = (zeros - jnp.inf, zeros, jnp.zeros((together, latent), jnp.float32))
    top, total, out = lax.fori_loop(first, end, turn, empty)
    seen = total > 0
    out = out / jnp.where(seen, total, 1)[:, None]
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
    # Past the end where there is no head: the interpreter writes there too
    head = jnp.where(is_head, head, heads)
    channel = jnp.arange(latent, dtype=jnp.int32)
    plgpu.store(out_ref.at[b, share, head[:, None], channel[None, :]], out, mask=is_head[:, None])
    plgpu.store(lse_ref.at[b, share, head], lse, mask=is_head)


def _merge(out_ref: Any, lse_ref: Any, merged_ref: Any, merged_lse_ref: Any) -> None:
    lse = lse_ref[...]
    top = jnp.max(lse)
    finite = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lse - finite)
    total = jnp.sum(weights)
    share = jnp.where(total == 0, 1, total)
    out = jnp.sum(weights[:, None] * out_ref[...], axis=0) / share
    merged_ref[...] = out.astype(merged_ref.dtype)
    merged_lse_ref[...] = jnp.where(total == 0, -jnp.inf, finite + jnp.log(share))
