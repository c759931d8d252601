"""Lists cases of KDA over a prompt at Kimi Linear's sizes, with inputs in the layout of the projections: one with any
gate, one with a gate bounded like K3's."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import kda
from pallas_kernels.kda import mosaic_tpu
from pallas_kernels.kda.mosaic_blocks import CHUNK
from pallas_kernels.kda.shapes import PROMPT
from tpu.case import Case

TOKENS, HEADS, WIDTH = PROMPT.T, PROMPT.H, PROMPT.Dk


def _case(lower_bound: float | None) -> Case:
    def build():
        def prefill(q, k, v, g, beta):
            q, k, v, g = (array.reshape(1, TOKENS, HEADS, WIDTH) for array in (q, k, v, g))
            o, state = kda(
                q,
                k,
                v,
                g,
                beta,
                normalize_qk=True,
                scale=WIDTH**-0.5,
                lower_bound=lower_bound,
                implementation="mosaic_tpu",
            )
            return o.reshape(1, TOKENS, HEADS * WIDTH), state

        bf16, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
        wide = (1, TOKENS, HEADS * WIDTH)
        return prefill, (bf16(wide), bf16(wide), bf16(wide), f32(wide), f32((1, TOKENS, HEADS)))

    gate = "any gate" if lower_bound is None else f"gate >= {lower_bound:g}"
    steps = HEADS // mosaic_tpu.heads_per_step(HEADS, WIDTH, WIDTH) * TOKENS // CHUNK
    per_chunk = 10 * CHUNK * CHUNK * WIDTH + 6 * CHUNK * WIDTH * WIDTH
    return Case(
        name=f"kda H={HEADS} {TOKENS // 1024}k tokens, {gate}",
        kernel="kda",
        build=build,
        # Grid steps, with two to fill and drain the pipeline; and the heads whose states begin a segment.
        trips=lambda: (steps + 2, HEADS),
        units=TOKENS // CHUNK * HEADS,
        unit="chunk of a head",
        hbm_bytes=TOKENS * HEADS * (WIDTH * (4 * 2 + 4) + 4) + 2 * 4 * HEADS * WIDTH * WIDTH,
        flops=TOKENS // CHUNK * HEADS * per_chunk,
    )


CASES = [_case(None), _case(-5.0)]
