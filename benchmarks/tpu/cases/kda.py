"""Lists cases of KDA over a prompt at Kimi Linear's sizes, with inputs in the layout of the projections: one with any
gate, one with a gate bounded like K3's."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import kda
from pallas_kernels.kda import mosaic_backward, mosaic_tpu
from pallas_kernels.kda.mosaic_backward import kda_backward
from pallas_kernels.kda.mosaic_blocks import CHUNK
from pallas_kernels.kda.mosaic_chunk import heads_per_step
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
    steps = HEADS // heads_per_step(HEADS, WIDTH, WIDTH, mosaic_tpu.MOST_CHANNELS) * TOKENS // CHUNK
    per_chunk = 10 * CHUNK * CHUNK * WIDTH + 6 * CHUNK * WIDTH * WIDTH
    return Case(
        name=f"kda H={HEADS} {TOKENS // 1024}k tokens, {gate}",
        kernel="kda",
        build=build,
        # Grid steps, with two to fill and drain the pipeline; and groups of heads whose states begin and end a segment.
        trips=lambda: (steps + 2, *[HEADS // mosaic_tpu.HEADS_TRANSPOSED] * 2),
        units=TOKENS // CHUNK * HEADS,
        unit="chunk of a head",
        hbm_bytes=TOKENS * HEADS * (WIDTH * (4 * 2 + 4) + 4) + 2 * 4 * HEADS * WIDTH * WIDTH,
        flops=TOKENS // CHUNK * HEADS * per_chunk,
    )


def _backward() -> Case:
    """Returns the case of the gradient of q, k, v, g, beta and the initial state, from saved states."""

    def build():
        def backward(q, k, v, g, beta, saved, do, dstates):
            heads = (array.reshape(1, TOKENS, HEADS, WIDTH) for array in (q, k, v, g))
            dtokens = kda_backward(
                *heads,
                beta,
                dstates,
                saved,
                do.reshape(1, TOKENS, HEADS, WIDTH),
                dstates,
                None,
                normalize_qk=True,
                scale=WIDTH**-0.5,
                interpret=False,
            )
            return *(array.reshape(1, TOKENS, HEADS * WIDTH) for array in dtokens[:4]), *dtokens[4:]

        bf16, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
        wide, state = (1, TOKENS, HEADS * WIDTH), (HEADS, WIDTH, WIDTH)
        tokens = (bf16(wide), bf16(wide), bf16(wide), f32(wide), f32((1, TOKENS, HEADS)))
        return backward, (*tokens, f32((1, TOKENS // CHUNK, *state)), bf16(wide), f32((1, 1, *state)))

    steps = HEADS // heads_per_step(HEADS, WIDTH, WIDTH, mosaic_backward.MOST_CHANNELS) * TOKENS // CHUNK
    per_chunk = 24 * CHUNK * CHUNK * WIDTH + 14 * CHUNK * WIDTH * WIDTH
    return Case(
        name=f"kda backward H={HEADS} {TOKENS // 1024}k tokens, any gate",
        kernel="kda_backward",
        build=build,
        trips=lambda: (steps + 2, HEADS),
        units=TOKENS // CHUNK * HEADS,
        unit="chunk of a head",
        hbm_bytes=TOKENS * HEADS * (WIDTH * (7 * 2 + 2 * 4) + 2 * 4) + (TOKENS // CHUNK + 2) * 4 * HEADS * WIDTH**2,
        flops=TOKENS // CHUNK * HEADS * per_chunk,
    )


CASES = [_case(None), _case(-5.0), _backward()]
