"""Attention from the newest tokens of each sequence to its paged latents, as one TPU kernel (`mosaic_prefill` is for
prompts).

FlashDecoding over pages (arXiv 2205.14135; paged caches: arXiv 2309.06180), absorbed heads (arXiv 2405.04434).

Layout: the cache stays [pages, width, page] in HBM. A block is `block_pages` pages side by side, [width, tokens] in
VMEM, tokens along the lanes: scores = q [H, width] @ block, a plain product, and out = p [H, tokens] @ block[:latent]^T
contracts the last axis of both, as the matrix unit can. Nothing is transposed, here or around the kernel.

A grid step is a sequence, and within it a loop runs over its blocks. While one block is worked on, the next is fetched,
page by page, into the other half of the buffer; after a sequence's last block that is the first of the next sequence,
so that short sequences hide their reads too. Only pages that a sequence has are read. Tokens past its length in the
buffer (old ones, or anything) are set to zero before use, since 0 * NaN is NaN.

Several tokens of a sequence (drafts to verify) are more rows H of q, each token with a length of its own: row r is of
token r modulo T. A latent is read once for all of them.

Blocks hold 1,024 tokens: the chain product, maximum, exponential, product then takes less time than the block's bytes
on v5e and v6e, and no more than 1.25 of it at 64 heads on v5p (1.65 for short sequences on tpu7x). bf16 operands
multiply as they are, weights rounded to bf16; float32 operands at HIGHEST. Softmax and sums are float32.

Spills: with 64 heads the float32 scores of a block (as many vectors as there are registers) wait in memory between
maximum and exponential, 60 to 310 stores and loads a block; an explicit buffer for them instead costs 7 % more bundles.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import LANES

BLOCK_TOKENS = 1024
# Below every score, yet finite: the difference to a score of -inf is then no NaN.
LOWEST = -1e37


def block_pages(page: int, max_pages: int) -> int:
    """Returns the number of pages that are read and worked on at a time."""
    return max(1, min(max_pages, BLOCK_TOKENS // page))


def unsupported(q: Array, cache: Array, page_table: Array, lengths: Array, *, latent: int) -> str | None:
    """Says why the decode kernel cannot serve these arguments; None where it can."""
    if 0 in (*q.shape, *page_table.shape, cache.shape[0]):
        return "it is empty"
    if (page := cache.shape[2]) % LANES:
        return f"pages hold {page} tokens, expected a multiple of {LANES}"
    if latent % LANES or (rope := q.shape[2] - latent) % 16 or not rope:
        return f"latents have {latent} + {q.shape[2] - latent} values, expected multiples of {LANES} and 16"
    if q.dtype != cache.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q is {q.dtype} and the cache {cache.dtype}, expected both bfloat16 or both float32"
    return None


def mla_decode(
    q: Float[Array, "B H width"],
    cache: Float[Array, "pages width page"],
    page_table: Int[Array, "B max_pages"],
    lengths: Int[Array, "B"] | Int[Array, "B T"],
    *,
    latent: int,
    scale: float,
    shards: int | None,
    interpret: bool | pltpu.InterpretParams,
) -> Array | tuple[Float[Array, "B H L"], Float[Array, "B H"]]:
    """See `api.mla_decode`; without `shards` returns the output in q's dtype and the float32 log-sum-exp.

    With lengths [B, T], row r of H is a query of token r modulo T.
    """
    (batch, heads, width), (_, _, page) = q.shape, cache.shape
    pages = block_pages(page, page_table.shape[1])
    if not interpret:
        # Else XLA moves a cache that fits to vector memory first, all of it.
        cache = pltpu.with_memory_space_constraint(cache, pltpu.HBM)

    def row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda b, *_: (b, 0, 0))

    if shards is None:
        out_specs = [row(heads, latent), row(1, heads)]
        out_shape = [
            jax.ShapeDtypeStruct((batch, heads, latent), q.dtype),
            jax.ShapeDtypeStruct((batch, 1, heads), jnp.float32),
        ]
    else:
        packed = (heads // shards, latent + 1)
        out_specs = [pl.BlockSpec((shards, None, *packed), lambda b, *_: (0, b, 0, 0))]
        out_shape = [jax.ShapeDtypeStruct((shards, batch, *packed), jnp.float32)]
    found = pl.pallas_call(
        partial(
            _decode_kernel,
            results=len(out_shape),
            latent=latent,
            scale=scale,
            pages=pages,
            new_tokens=lengths.size // batch,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[row(heads, width), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((2, width, pages * page), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((heads, 1), jnp.float32),
                pltpu.VMEM((heads, LANES), jnp.float32),
                pltpu.VMEM((heads, latent), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        # As if all sequences filled their tables.
        cost_estimate=pl.CostEstimate(
            flops=2 * heads * (width + latent) * page_table.size * page,
            transcendentals=heads * page_table.size * page,
            bytes_accessed=page_table.size * page * width * cache.dtype.itemsize + 2 * q.nbytes,
        ),
        interpret=interpret,
        name="mla_decode",
    )(page_table.reshape(-1), lengths.reshape(-1), q, cache)
    return found[0] if shards is not None else (found[0], found[1][:, 0])


def _decode_kernel(
    table,
    lengths,
    q,
    cache,
    *refs,
    results,
    latent,
    scale,
    pages,
    new_tokens,
):
    outs, (buffer, arrived, side, top, total, acc) = refs[:results], refs[results:]
    sequence, page, batch = pl.program_id(0), cache.shape[2], lengths.shape[0] // new_tokens
    max_pages = table.shape[0] // batch

    def longest(row):
        return functools.reduce(jnp.maximum, (lengths[row * new_tokens + t] for t in range(new_tokens)))

    length = seen = longest(sequence)
    if new_tokens > 1:
        token = lax.rem(lax.broadcasted_iota(jnp.int32, top.shape, 0), new_tokens)
        seen = functools.reduce(
            lambda column, t: jnp.where(token == t, lengths[sequence * new_tokens + t], column),
            range(new_tokens),
            jnp.zeros_like(token),
        )
    # An empty sequence has one block of no pages: the reads ahead then need not look for the next that is not empty.
    blocks = jnp.maximum(pl.cdiv(length, pages * page), 1)

    def for_pages(sequence, block, half, act):
        """Calls `act` with the copy of every page that the block has."""
        row = jnp.minimum(sequence, batch - 1)
        present = jnp.where(sequence < batch, pl.cdiv(longest(row), page), 0) - block * pages
        for i in range(pages):

            @pl.when(i < present)
            def _(i=i):
                chosen = table[row * max_pages + block * pages + i]
                place = buffer.at[half, :, pl.ds(i * page, page)]
                act(pltpu.make_async_copy(cache.at[chosen], place, arrived.at[half]))

    @pl.when(sequence == 0)
    def _():
        side[0] = 0
        for_pages(0, 0, 0, lambda copy: copy.start())

    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

    def attend_block(block, half):
        last = block + 1 == blocks
        for_pages(sequence + last, jnp.where(last, 0, block + 1), 1 - half, lambda copy: copy.start())
        for_pages(sequence, block, half, lambda copy: copy.wait())
        within = length - block * pages * page

        def blank(i, _):
            tokens = buffer.at[half, :, pl.ds(pl.multiple_of(i * page, LANES), page)]
            known = i * page + lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < within
            tokens[...] = jnp.where(known, tokens[...].astype(jnp.float32), 0).astype(tokens.dtype)
            return _

        lax.fori_loop(jnp.minimum(within // page, pages), pages, blank, None)
        visible = within if new_tokens == 1 else seen - block * pages * page
        _attend(q[0, :, :latent], q[0, :, latent:], buffer.at[half], visible, top, total, acc, scale)
        return 1 - half

    side[0] = lax.fori_loop(0, blocks, attend_block, side[0])

    @pl.when(length > 0)
    def _():
        weight = jnp.sum(total[...], axis=1, keepdims=True)
        if new_tokens == 1:
            _write(outs, acc[...] / weight, math.log(2) * top[...] + jnp.log(weight))
        else:  # a token may see nothing, while others of its sequence do
            sees = weight > 0
            weight = jnp.where(sees, weight, 1)
            _write(outs, acc[...] / weight, jnp.where(sees, math.log(2) * top[...] + jnp.log(weight), -jnp.inf))

    @pl.when(length <= 0)
    def _():
        _write(outs, jnp.zeros_like(acc), jnp.full_like(top, -jnp.inf))


def _write(outs, out, column):
    """Writes a sequence's outputs [H, L] and log-sum-exps [H, 1]: into an array each, or packed for some devices."""
    if len(outs) == 1:
        (packed,) = outs
        shards, heads, latent = packed.shape[0], packed.shape[1], packed.shape[2] - 1
        for shard in range(shards):
            rows = slice(shard * heads, (shard + 1) * heads)
            packed[shard, :, :latent] = out[rows]
            packed[shard, :, latent:] = column[rows]
        return
    outs[0][0] = out.astype(outs[0].dtype)
    # A column becomes a row: each head keeps its own lane of a square, and the square's rows are added up.
    square = (column.shape[0],) * 2
    own = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(jnp.int32, square, 1)
    outs[1][0] = jnp.sum(jnp.where(own, column, 0), axis=0, keepdims=True)


def _attend(q_latent, q_rope, tokens, within, top, total, acc, scale):
    """Adds the block `tokens` [width, tokens], of which each query sees the first `within`, a number or a column;
    scores are in powers of two."""
    latent = q_latent.shape[1]
    scores = _dot(q_latent, tokens[:latent], 0) + _dot(q_rope, tokens[latent:], 0)
    token = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(token < within, scores * (scale / math.log(2)), -jnp.inf)
    new_top = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - new_top)
    keep = jnp.exp2(top[...] - new_top)
    top[...] = new_top
    # Lane by lane; summed over the lanes once per sequence.
    total[...] = keep * total[...] + sum(weights[:, at : at + LANES] for at in range(0, weights.shape[1], LANES))
    acc[...] = keep * acc[...] + _dot(weights.astype(q_latent.dtype), tokens[:latent], 1)


def _dot(a: Float[Array, "m c"], b: Array, axis: int) -> Float[Array, "m n"]:
    """Multiplies a [m, c] by b, whose `axis` is contracted, to float32: float32 operands in full, bf16 in one pass."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
