"""Latent attention at Kimi's widths: decode for all 64 heads and for the 8 that eight devices leave."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import mla_decode
from pallas_kernels.mla_attention import mosaic_tpu
from tpu.case import Case

LATENT, ROPE, PAGE = 512, 64, 128
SCALE = 192**-0.5


def _decode(heads: int, batch: int, tokens: int) -> Case:
    max_pages = -(-tokens // PAGE)
    blocks = -(-max_pages // mosaic_tpu.block_pages(PAGE, max_pages))

    def build():
        bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        int32 = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        return partial(mla_decode, scale=SCALE, return_lse=True, implementation="mosaic_tpu"), (
            bf16((batch, heads, LATENT)),
            bf16((batch, heads, ROPE)),
            bf16((batch * max_pages, LATENT + ROPE, PAGE)),
            int32((batch, max_pages)),
            int32((batch,)),
        )

    length = f"{tokens // 1024}k"
    return Case(
        name=f"mla_decode H={heads} {batch} sequences of {length}",
        kernel="mla_decode",
        build=build,
        # Sequences (and the steps that fill and drain the pipeline), their blocks, and pages to blank: all are full.
        trips=lambda: (batch + 2, batch * blocks, 0),
        units=batch * tokens / 1024,
        unit="1,024 tokens of one sequence",
        hbm_bytes=2.0 * batch * (tokens * (LATENT + ROPE) + heads * (2 * LATENT + ROPE)),
        flops=2.0 * batch * tokens * heads * (2 * LATENT + ROPE),
    )


CASES = [
    _decode(heads, batch, tokens)
    for heads in (64, 8)
    for batch, tokens in ((64, 1024), (64, 8192), (64, 32768), (8, 262144))
]
