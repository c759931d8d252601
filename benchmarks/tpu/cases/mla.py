"""Lists cases of latent attention at Kimi's widths: decode for all 64 heads and for the 8 of one of eight devices,
prefill (whose cost is a multiple of one group of heads), and writes."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import mla_decode, mla_prefill, mla_write
from pallas_kernels.mla_attention import mosaic_prefill, mosaic_tpu
from tpu.case import Case

LATENT, ROPE, PAGE = 512, 64, 128
NOPE, VALUES = 128, 128
SCALE = 192**-0.5


def _decode(heads: int, batch: int, tokens: int, shards: int | None = None) -> Case:
    max_pages = -(-tokens // PAGE)
    blocks = -(-max_pages // mosaic_tpu.block_pages(PAGE, max_pages))

    def build():
        bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        options = {"latent": LATENT, "scale": SCALE, "return_lse": True, "shards": shards}
        return partial(mla_decode, **options, implementation="mosaic_tpu"), (
            bf16((batch, heads, LATENT + ROPE)),
            bf16((batch * max_pages, LATENT + ROPE, PAGE)),
            int32((batch, max_pages)),
            int32((batch,)),
        )

    return Case(
        name=f"mla_decode H={heads} {batch} sequences of {_thousands(tokens)}"
        + (f", packed for {shards}" if shards else ""),
        kernel="mla_decode",
        build=build,
        # Sequences, with two to fill and drain the pipeline; their blocks; and pages to blank: none, all are full.
        trips=lambda: (batch + 2, batch * blocks, 0),
        units=batch * tokens / 1024,
        unit="1,024 tokens of one sequence",
        hbm_bytes=2.0 * batch * (tokens * (LATENT + ROPE) + heads * (2 * LATENT + ROPE)),
        flops=2.0 * batch * tokens * heads * (2 * LATENT + ROPE),
    )


def _prefill(heads: int, queries: int, keys: int) -> Case:
    """Returns the case of the last `queries` of `keys` tokens of one sequence, arrays in the layout of projections."""
    width, values = NOPE + ROPE, VALUES
    bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def run(q, k, v, q_positions, kv_positions):
        out = mla_prefill(
            q.reshape(1, queries, heads, width),
            k.reshape(1, keys, heads, width),
            v.reshape(1, keys, heads, values),
            q_positions=q_positions,
            kv_positions=kv_positions,
            scale=SCALE,
            implementation="mosaic_tpu",
        )
        return out.reshape(1, queries, heads * values)

    def build():
        return run, (
            bf16((1, queries, heads * width)),
            bf16((1, keys, heads * width)),
            bf16((1, keys, heads * values)),
            int32((1, queries)),
            int32((1, keys)),
        )

    def trips() -> tuple[int, ...]:
        size = mosaic_prefill.choose_blocks(bf16((1, queries, heads, width)), bf16((1, keys, heads, width)))
        groups, q_blocks = heads // size.heads, -(-queries // size.queries)
        blocks, parts = -(-keys // size.keys), size.keys // size.part
        whole = divided = whole_parts = masked_parts = 0
        for first in range(keys - queries, keys, size.queries):
            wholly_seen, last = (first + 1) // size.keys, first + size.queries
            whole += wholly_seen
            divided += -(-last // size.keys) - wholly_seen
            parts_seen = (first + 1) // size.part - wholly_seen * parts
            whole_parts += parts_seen
            masked_parts += -(-last // size.part) - wholly_seen * parts - parts_seen
        return (
            # Grid steps, with two to fill and drain the pipeline; once, blocks of queries and parts of keys; blocks of
            # keys of all steps.
            groups * q_blocks + 2,
            q_blocks,
            q_blocks * blocks * parts,
            groups * (whole + divided),
            # In a step: whole blocks; parts of other blocks; those that are seen whole, and those that are not.
            groups * whole,
            groups * divided * parts,
            groups * whole_parts,
            groups * masked_parts,
        )

    pairs = queries * (keys - queries) + queries * (queries + 1) / 2
    return Case(
        name=f"mla_prefill H={heads} {_thousands(queries)} of {_thousands(keys)}",
        kernel="mla_prefill",
        build=build,
        trips=trips,
        units=heads * pairs / 2**20,
        unit="1,024 x 1,024 scores that count",
        hbm_bytes=2.0 * heads * (queries + keys) * (width + values),
        flops=2.0 * heads * pairs * (width + values),
    )


def _write(batch: int, rows: int, tokens: int, start: int = 0) -> Case:
    """Returns the case of writing `rows` consecutive tokens from `start` on to each of `batch` sequences, which have
    pages for `tokens`."""
    max_pages = -(-tokens // PAGE)
    width = LATENT + ROPE
    pages = batch * (-(-(start + rows) // PAGE))
    blocks = -(-batch * rows // PAGE)
    runs = batch if rows == 1 else blocks * (2 if start else 1)
    whole = rows > 1 and start == 0  # whole pages are written without being read first

    def build():
        bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        shape = (batch, rows)
        return mla_write, (
            bf16((batch * max_pages, width, PAGE)),
            bf16((*shape, width)),
            int32((batch, max_pages)),
            int32(shape),
        )

    return Case(
        name=f"mla_write {batch} sequences, {rows} rows" + (f" from {start}" if start else ""),
        kernel="mla_write",
        build=build,
        # Blocks of rows, with two to fill and drain the pipeline, a loop only for several; their runs of rows in one
        # page; and searches for the next run.
        trips=lambda: (*([blocks + 2] if blocks > 1 else []), runs, runs),
        units=batch * rows,
        unit="rows",
        hbm_bytes=2.0 * ((1 if whole else 2) * pages * width * PAGE + batch * rows * width),
        flops=0.0,
        donate=(0,),
    )


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k"


CASES = [
    *[
        _decode(heads, batch, tokens)
        for heads in (64, 8)
        for batch, tokens in ((64, 1024), (64, 8192), (64, 32768), (8, 262144))
    ],
    _decode(64, 8, 1024, shards=8),
    _prefill(64, 4096, 4096),
    _prefill(64, 2048, 32768),
    _write(64, 1, 8192),
    _write(1, 2048, 8192),
    _write(1, 2048, 8192, start=64),
]
