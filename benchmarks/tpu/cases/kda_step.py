"""Lists cases of one KDA token of a batch: Kimi Linear's 32 heads of 128 x 128, inputs in the layout of projections."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import kda_step
from tpu.case import Case

HEADS, WIDTH = 32, 128


def _case(batch: int) -> Case:
    def build():
        def step(q, k, v, g, beta, state):
            q, k, v, g = (array.reshape(batch, HEADS, WIDTH) for array in (q, k, v, g))
            o, state = kda_step(
                q, k, v, g, beta, state, normalize_qk=True, scale=WIDTH**-0.5, implementation="mosaic_tpu"
            )
            return o.reshape(batch, HEADS * WIDTH), state

        bf16, f32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
        wide = (batch, HEADS * WIDTH)
        return step, (
            bf16(wide),
            bf16(wide),
            bf16(wide),
            f32(wide),
            f32((batch, HEADS)),
            f32((batch, HEADS, WIDTH, WIDTH)),
        )

    per_head = 2 * 4 * WIDTH * WIDTH + WIDTH * (4 * 2 + 4) + 4
    return Case(
        name=f"kda_step H={HEADS} batch {batch}",
        kernel="kda_step",
        build=build,
        # Grid steps of eight sequences and four heads, with two to fill and drain the pipeline; and the heads.
        trips=lambda: (batch // 8 * HEADS // 4 + 2, batch // 8 * HEADS),
        units=batch * HEADS,
        unit="head of a sequence",
        hbm_bytes=batch * HEADS * per_head,
        flops=0.0,
        donate=(5,),
    )


CASES = [_case(64)]
