"""Lists cases of the projections around K2's decode attention: 8 and 64 tokens, and the 8 heads of one of eight
devices. HBM bytes are those of the weights."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import mla_output, mla_query
from pallas_kernels.mla_projections import mosaic_tpu
from tpu.case import Case

HIDDEN, LOW, LATENT, NOPE, ROPE, HEADS = 7168, 1536, 512, 128, 64, 8

BF16, F32 = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))


def _query(batch: int) -> Case:
    def build():
        def run(q_a, kv_a, cos, sin, *weights):
            options = {"heads": HEADS, "eps": 1e-6, "implementation": "mosaic_tpu"}
            return mla_query(q_a, kv_a, (cos, sin), *weights, **options)

        low = BF16((batch, LOW)), BF16((batch, LATENT + ROPE)), F32((batch, ROPE)), F32((batch, ROPE))
        norms = BF16((LOW,)), BF16((LATENT,))
        return run, (*low, *norms, BF16((HEADS * (NOPE + ROPE), LOW)), BF16((HEADS * 2 * NOPE, LATENT)))

    weights = HEADS * ((NOPE + ROPE) * LOW + NOPE * LATENT)
    return Case(
        name=f"mla_query H={HEADS} of {batch} tokens",
        kernel="mla_query",
        build=build,
        trips=lambda: (HEADS,),
        units=HEADS,
        unit="head",
        hbm_bytes=2.0 * weights,
        flops=2.0 * batch * weights,
    )


def _output(batch: int) -> Case:
    def build():
        run = partial(mla_output, implementation="mosaic_tpu")
        return run, (BF16((batch, HEADS, LATENT)), BF16((HEADS * 2 * NOPE, LATENT)), BF16((HIDDEN, HEADS * NOPE)))

    weights = HEADS * (NOPE * LATENT + NOPE * HIDDEN)
    return Case(
        name=f"mla_output H={HEADS} of {batch} tokens",
        kernel="mla_output",
        build=build,
        trips=lambda: (HIDDEN // (mosaic_tpu.STEP_BYTES // (2 * HEADS * NOPE)),),
        units=2.0 * weights / 1024,
        unit="KiB of weights",
        hbm_bytes=2.0 * weights,
        flops=2.0 * batch * weights,
    )


CASES = [make(batch) for make in (_query, _output) for batch in (8, 64)]
