"""The gradient of `mosaic_tpu` as one Pallas kernel for TPUs: visits in reverse, each recomputed from its saved state.

The forward kernel saves the state S before each visit. A grid step takes a visit again (decays, products, the inverse
T) and the gradient dS' of the state after it, which stays in vector memory for all visits of a segment. With the
decays and products of `mosaic_tpu`, K' = exp(G) K, Q' = exp(G) Q, K" = exp(G_C - G) K, T = (I + beta A)^-1, where beta
scales rows, and V' = T beta (V - K' S):
    dV' = Aqk^T dO + K" dS';   Y = T^T dV';   dV = beta Y;   N = -beta Y;
    dAqk = dO V'^T;   d(k k^T) = N V'^T, both below the diagonal;   dbeta = rowsum(Y * (V - K' S - (k k^T) V'));
    dQ' = dO S^T;   dK' = N S^T;   dK" = V' dS'^T;   dS = exp(G_C) dS' + Q'^T dO + K'^T N.
(dT is not formed: the inverse's gradient is in dV and in d(k k^T).) Gradients of decayed products go to keys, queries
and exponents level by level (`mosaic_score_gradients`), with cuts down to single tokens for bounded gates too: in
blocks without a cut the gradients of the exponents would cancel.

Precision is the forward kernel's: products are of bf16 operands if q, k and v are bf16, of full float32 if they are
float32; T is computed to float32, and so is everything outside of products. Gradients of exponents are summed in
float32, of one bf16 part (bf16) or three (float32).

Spills: as in the forward kernel the compiler begins many packs at once (some 1,750 stores and loads per head on v6e).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import LANES, VMEM_LIMIT
from pallas_kernels.kda import mosaic_score_gradients as score_gradients
from pallas_kernels.kda import mosaic_scores as scores
from pallas_kernels.kda.mosaic_backward_parts import (
    GradientScratch,
    add_level_gradients,
    write_gradients,
    write_product_gradients,
    write_products,
    write_scores,
    write_state_gradients,
    write_value_gradients,
    write_values,
)
from pallas_kernels.kda.mosaic_blocks import CHUNK
from pallas_kernels.kda.mosaic_chunk import KdaTiling, heads_per_step, marks, stagger, write_segments
from pallas_kernels.kda.mosaic_inverse import invert
from pallas_kernels.kda.visits import chunk_visits

# Key and value channels of all heads in a step: 16 heads of 128 and 128.
MOST_CHANNELS = 4096


def kda_backward(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    initial: Float[Array, "B N H Dk Dv"],
    saved: Float[Array, "B visits H Dk Dv"],
    do: Float[Array, "B T H Dv"],
    dstates: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    normalize_qk: bool,
    scale: float,
    interpret: Any,
) -> tuple[Array, ...]:
    """Returns the gradients of q, k, v, g, beta and the initial states, each in its array's dtype.

    Arguments are those of `backward.gradients`; `saved` are the states before each visit (`mosaic_tpu.kda`).
    """
    (batch, tokens, total, Dk), Dv, dtype = q.shape, v.shape[3], q.dtype
    heads = heads_per_step(total, Dk, Dv, MOST_CHANNELS)
    tiling = KdaTiling(heads, 2 - heads % 2, 1, normalize_qk, scale)
    pack, packs, lanes, groups = tiling.pack, tiling.packs, tiling.pack * CHUNK, total // heads
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, tokens), jnp.int32)
    visit = chunk_visits(segment_ids, dstates.shape[1], CHUNK)
    visits, parts = visit.chunk.shape[1], 1 if dtype == jnp.bfloat16 else 3
    weights = np.tile(scores.sum_weights(1), (1, 2 if dtype == jnp.bfloat16 else 3))
    exponents = np.tile(score_gradients.exponent_weights(), (1, parts))
    codes, gradient_codes = scores.level_codes(1, pack), score_gradients.gradient_codes(pack)

    def constant(array: np.ndarray) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0, 0))

    # Dead visits come first, which have the chunk and the segment of the first live one.
    def token(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, CHUNK, heads * width), lambda b, j, n, chunk, *_: (b, chunk[b, visits - 1 - n], j))

    mark = pl.BlockSpec(
        (None, None, None, packs + 1, lanes), lambda b, j, n, chunk, *_: (b, j, chunk[b, visits - 1 - n], 0, 0)
    )
    at_visit = pl.BlockSpec(
        (None, None, heads, Dk, Dv),
        lambda b, j, n, _, __, total: (b, jnp.minimum(visits - 1 - n, total[b] - 1), j, 0, 0),
    )
    state = pl.BlockSpec(
        (None, None, heads, Dk, Dv), lambda b, j, n, _, segment, *__: (b, segment[b, visits - 1 - n], j, 0, 0)
    )
    per_token = pl.BlockSpec((None, None, CHUNK, heads), lambda b, j, n, chunk, *_: (b, j, chunk[b, visits - 1 - n], 0))

    def scratch(rows: int, width: int, kind: Any = jnp.float32) -> Any:
        return pltpu.VMEM((packs, rows, width), kind)

    keys, values = pack * Dk, pack * Dv
    *gradients, dbeta, dinitial = pl.pallas_call(
        partial(_kernel, tiling=tiling, parts=parts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, groups, visits),
            in_specs=[
                *map(constant, (weights, exponents, codes, gradient_codes)),
                *map(token, (Dk, Dk, Dv, Dk, Dv)),
                mark,
                at_visit,
                state,
            ],
            out_specs=[*map(token, (Dk, Dk, Dv, Dk)), per_token, state],
            scratch_shapes=GradientScratch(
                ids=pltpu.VMEM((CHUNK, LANES), jnp.float32),
                k=scratch(CHUNK, keys),
                q=scratch(CHUNK, keys),
                factors=scratch(CHUNK * scores.num_factors(1), keys),
                products=scratch(scores.num_products(1), lanes),
                A=scratch(CHUNK, lanes),
                T=scratch(CHUNK, lanes),
                qk=scratch(CHUNK, lanes, dtype),
                kk=scratch(CHUNK, lanes, dtype),
                do=scratch(CHUNK, values, dtype),
                left=scratch(CHUNK, values),
                new=scratch(CHUNK, values, dtype),
                negated=scratch(CHUNK, values, dtype),
                products_gradient=scratch(2 * CHUNK, 2 * lanes),
                dk=scratch(CHUNK, keys),
                dq=scratch(CHUNK, keys),
                exponents=scratch(CHUNK * score_gradients.EXPONENTS * parts, keys, jnp.bfloat16),
            ),
        ),
        out_shape=[
            *(jax.ShapeDtypeStruct((batch, tokens, total * array.shape[3]), array.dtype) for array in (q, k, v, g)),
            jax.ShapeDtypeStruct((batch, groups, tokens, heads), jnp.float32),
            jax.ShapeDtypeStruct(dstates.shape, jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="kda_backward",
        interpret=interpret,
    )(
        *visit,
        *(jnp.asarray(array, jnp.bfloat16) for array in (weights, exponents)),
        jnp.asarray(codes),
        jnp.asarray(gradient_codes),
        *(array.reshape(batch, tokens, -1) for array in (q, k, v, g, do)),
        marks(beta, segment_ids, tiling),
        saved,
        dstates,
    )
    dbeta = jnp.swapaxes(dbeta, 1, 2).reshape(beta.shape).astype(beta.dtype)
    return *(array.reshape(like.shape) for array, like in zip(gradients, (q, k, v, g), strict=True)), dbeta, dinitial


def _kernel(
    chunk,
    segment,
    total,
    weights,
    exponent_weights,
    codes,
    gradient_codes,
    q,
    k,
    v,
    g,
    do,
    marks,
    saved,
    dstates,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    dstate,
    *scratch,
    tiling: KdaTiling,
    parts: int,
) -> None:
    batch, visit = pl.program_id(0), pl.num_programs(2) - 1 - pl.program_id(2)
    after = jnp.minimum(visit + 1, pl.num_programs(2) - 1)
    live, first = visit < total[batch], visit == total[batch] - 1
    own = segment[batch, visit]
    opens = first | (chunk[batch, visit] != chunk[batch, after])

    @pl.when(first | (live & (own != segment[batch, after])))
    def _begin() -> None:
        def copy(h: Array, _: None) -> None:
            dstate[h] = dstates[h]

        lax.fori_loop(0, tiling.heads, copy, None)

    @pl.when(live)
    def _advance() -> None:
        work, dtype = GradientScratch(*scratch), q.dtype
        write_segments(marks, work, tiling)
        stagger([write_products(p, own, q, k, g, weights, work, tiling) for p in range(tiling.packs)])
        write_scores(own, marks, codes, work, tiling, dtype)
        invert(work.A, work.T)
        write_values(own, v, do, marks, saved, work, tiling)
        write_value_gradients(own, opens, marks, dstate, dv, dbeta, work, tiling)
        write_product_gradients(work, tiling)
        write_state_gradients(saved, dstate, work, tiling, parts)
        add_level_gradients(gradient_codes, work, tiling, parts, dtype)
        write_gradients(own, opens, q, k, exponent_weights, dq, dk, dg, work, tiling)
