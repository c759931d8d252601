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


def _query(batch: int, shards: int = 1) -> Case:
    """Returns the case of low ranks that one device has, or whose columns are gathered from several."""

    def build():
        def run(q_a, kv_a, cos, sin, *weights):
            options = {"heads": HEADS, "eps": 1e-6, "implementation": "mosaic_tpu"}
            return mla_query(q_a, kv_a, (cos, sin), *weights, **options)

        kv_a = BF16((shards, batch, (LATENT + ROPE + (LOW if shards > 1 else 0)) // shards))
        low = (BF16((batch, LOW)) if shards == 1 else None), kv_a, F32((batch, ROPE)), F32((batch, ROPE))
        norms = BF16((LOW,)), BF16((LATENT,))
        return run, (*low, *norms, BF16((HEADS * (NOPE + ROPE), LOW)), BF16((HEADS * 2 * NOPE, LATENT)))

    weights = HEADS * ((NOPE + ROPE) * LOW + NOPE * LATENT)
    return Case(
        name=f"mla_query H={HEADS} of {batch} tokens" + (f", gathered from {shards}" if shards > 1 else ""),
        kernel="mla_query",
        build=build,
        trips=lambda: (HEADS,),
        units=HEADS,
        unit="head",
        hbm_bytes=2.0 * weights,
        flops=2.0 * batch * weights,
    )


def _output(batch: int, shards: int | None = None) -> Case:
    def build():
        run = partial(mla_output, implementation="mosaic_tpu")
        o = BF16((batch, HEADS, LATENT)) if shards is None else F32((shards, batch, HEADS, LATENT + 1))
        return run, (o, BF16((HEADS * 2 * NOPE, LATENT)), BF16((HIDDEN, HEADS * NOPE)))

    weights = HEADS * (NOPE * LATENT + NOPE * HIDDEN)
    return Case(
        name=f"mla_output H={HEADS} of {batch} tokens" + (f", merged from {shards}" if shards else ""),
        kernel="mla_output",
        build=build,
        # Tiles; where attentions are merged, tokens
        trips=lambda: (HIDDEN // (mosaic_tpu.STEP_BYTES // (2 * HEADS * NOPE)), *([batch] if shards else [])),
        units=2.0 * weights / 1024,
        unit="KiB of weights",
        hbm_bytes=2.0 * weights,
        flops=2.0 * batch * weights,
    )


CASES = [*(make(batch) for make in (_query, _output) for batch in (8, 64)), _query(8, shards=8), _output(8, shards=8)]
