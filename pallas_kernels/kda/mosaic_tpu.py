"""Kimi Delta Attention of many tokens as one Pallas kernel for TPUs (arXiv 2510.26692, section 3; formulas in `xla`).

A grid step is a visit (`mosaic_chunk`) for up to 16 heads. Projections are read as they come, [B, T, H * D], heads
along the lanes. The float32 state stays in vector memory, in its output block, for all visits of a segment. Every part
of the work is done for all packs of heads (`mosaic_blocks`) before the next part, so that the matrix unit, whose
results take some hundred cycles, always has another pack to go on with; intermediate results wait in scratch memory.

With S the state, G the running log decay, T = (I + A)^-1 and A, Aqk the decayed products (`mosaic_scores`):
    V' = T beta (V - (exp(G) K) S);   O = (exp(G) Q) S + Aqk V';   S <- exp(G_C) S + (exp(G_C - G) K)^T V',
where T is applied once, to the part of V that the state does not explain. Products are of bf16 operands if q, k and v
are bf16, of full float32 if they are float32; T is computed to float32 in either case, and so is everything outside of
products.

Spills: the compiler begins many packs at once, and values that do not fit in registers wait in memory, beside the
scratch (some 415 stores and loads per head on v6e, in slots that nothing else uses).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hardware import LANES, VMEM_LIMIT
from pallas_kernels.kda import mosaic_scores as scores
from pallas_kernels.kda.mosaic_blocks import CHUNK, block_diagonal, dot, split_heads
from pallas_kernels.kda.mosaic_chunk import (
    KdaTiling,
    beta_columns,
    betas,
    heads_per_step,
    marks,
    segment_rows,
    side_by_side,
    write_operands,
    write_products,
)
from pallas_kernels.kda.mosaic_inverse import invert
from pallas_kernels.kda.visits import chunk_visits

# Key and value channels of all heads in a step: 16 heads of 128 and 128.
MOST_CHANNELS = 4096


class KdaScratch(NamedTuple):
    """Scratch memory: each token's segment along its row; then for each pack the keys and queries, the decay factors
    and products of `mosaic_scores`, A, its inverse, Aqk, and the values that queries read from the state."""

    ids: Any
    k: Any
    q: Any
    factors: Any
    products: Any
    A: Any
    T: Any
    qk: Any
    read: Any


def unsupported(q: Array, k: Array, v: Array, g: Array, *others: Array | None) -> str | None:
    """Says why the kernel cannot serve these arguments; None where it can."""
    if 0 in (*q.shape, *v.shape):
        return "it is empty"
    if q.shape[3] % LANES or v.shape[3] % LANES:
        return f"heads have {q.shape[3]} key and {v.shape[3]} value channels, expected multiples of {LANES}"
    dtypes = {str(array.dtype) for array in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected all of them bfloat16 or all float32"
    return None if g.dtype == jnp.float32 else f"g is {g.dtype}, expected float32"


def kda(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    states: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    normalize_qk: bool,
    scale: float,
    lower_bound: float | None,
    visit_states: bool = False,
    interpret: Any,
) -> tuple[Array, ...]:
    """Returns outputs in v's dtype and the states after each segment; arguments are those of `xla.chunked`.

    With `visit_states` it also returns the state before each visit, float32 [B, visits, H, Dk, Dv].
    """
    (batch, tokens, total, Dk), Dv = q.shape, v.shape[3]
    heads = heads_per_step(total, Dk, Dv, MOST_CHANNELS)
    tiling = KdaTiling(heads, 2 - heads % 2, scores.base_block(lower_bound), normalize_qk, scale)
    packs, lanes = tiling.packs, tiling.pack * CHUNK
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, tokens), jnp.int32)
    visit = chunk_visits(segment_ids, states.shape[1], CHUNK)
    weights = np.tile(scores.sum_weights(tiling.base), (1, 2 if q.dtype == jnp.bfloat16 else 3))
    codes = scores.level_codes(tiling.base, tiling.pack)

    def constant(array: np.ndarray) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0, 0))

    def token(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, CHUNK, heads * width), lambda b, j, n, chunk, *_: (b, chunk[b, n], j))

    mark = pl.BlockSpec((None, None, None, packs + 1, lanes), lambda b, j, n, chunk, *_: (b, j, chunk[b, n], 0, 0))
    state = pl.BlockSpec((None, None, heads, Dk, Dv), lambda b, j, n, _, segment, *__: (b, segment[b, n], j, 0, 0))
    at_visit = pl.BlockSpec(
        (None, None, heads, Dk, Dv), lambda b, j, n, _, __, total: (b, jnp.minimum(n, total[b] - 1), j, 0, 0)
    )
    visits = visit.chunk.shape[1]

    def scratch(rows: int, width: int, dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM((packs, rows, width), dtype)

    o, states, *saved = pl.pallas_call(
        partial(_kernel, tiling=tiling, visit_states=visit_states),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, total // heads, visits),
            in_specs=[constant(weights), constant(codes), *map(token, (Dk, Dk, Dv, Dk)), mark, state],
            out_specs=[token(Dv), state, *[at_visit] * visit_states],
            scratch_shapes=KdaScratch(
                ids=pltpu.VMEM((CHUNK, LANES), jnp.float32),
                k=scratch(CHUNK, tiling.pack * Dk),
                q=scratch(CHUNK, tiling.pack * Dk),
                factors=scratch(CHUNK * scores.num_factors(tiling.base), tiling.pack * Dk),
                products=scratch(scores.num_products(tiling.base), lanes),
                A=scratch(CHUNK, lanes),
                T=scratch(CHUNK, lanes),
                qk=scratch(CHUNK, lanes, q.dtype),
                read=scratch(CHUNK, tiling.pack * Dv),
            ),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, tokens, total * Dv), v.dtype),
            jax.ShapeDtypeStruct(states.shape, jnp.float32),
            *[jax.ShapeDtypeStruct((batch, visits, total, Dk, Dv), jnp.float32)] * visit_states,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="kda",
        interpret=interpret,
    )(
        *visit,
        jnp.asarray(weights, jnp.bfloat16),
        jnp.asarray(codes),
        *(array.reshape(batch, tokens, -1) for array in (q, k, v, g)),
        marks(beta, segment_ids, tiling),
        states,
    )
    return o.reshape(v.shape), states, *saved


def _kernel(
    chunk,
    segment,
    total,
    weights,
    codes,
    q,
    k,
    v,
    g,
    marks,
    initial,
    o,
    state,
    *rest,
    tiling: KdaTiling,
    visit_states: bool,
) -> None:
    saved, scratch = rest[:visit_states], rest[visit_states:]
    batch, visit = pl.program_id(0), pl.program_id(2)
    before = jnp.maximum(visit - 1, 0)
    live = visit < total[batch]
    own = segment[batch, visit]
    opens = (visit == 0) | (chunk[batch, visit] != chunk[batch, before])

    @pl.when(live & ((visit == 0) | (own != segment[batch, before])))
    def _begin() -> None:
        def copy(h: Array, _: None) -> None:
            state[h] = initial[h]

        lax.fori_loop(0, tiling.heads, copy, None)

    @pl.when(live)
    def _advance() -> None:
        work = KdaScratch(*scratch)
        write_operands(own, q, k, g, marks, weights, work, tiling)
        write_products(work, tiling, q.dtype)
        _write_scores(own, marks, codes, work, tiling, q.dtype)
        invert(work.A, work.T, tiling.pack)
        _outputs(own, opens, v, marks, o, state, saved, work, tiling)


def _write_scores(own, marks, codes, work: KdaScratch, tiling: KdaTiling, dtype: Any) -> None:
    """Writes A (decayed k k^T scaled by beta) and Aqk to scratch."""
    for p in range(tiling.packs):
        keys, queries = scores.select(work.products[p], codes[...], tiling.base)
        work.A[p] = side_by_side(beta_columns(p, own, marks, tiling)) * keys
        work.qk[p] = queries.astype(dtype)


def _outputs(own, opens, v, marks, o, state, saved, work: KdaScratch, tiling: KdaTiling) -> None:
    """Writes the outputs, the state before the chunk into `saved` (a ref or none), and the state after it."""
    packs, pack, dtype = range(tiling.packs), tiling.pack, v.dtype
    left, new = [], []
    for p in packs:
        since = work.factors[p, -2 * CHUNK : -CHUNK]
        S = block_diagonal([state[p * pack + h].astype(dtype) for h in range(pack)])
        seen = dot(jnp.concatenate([work.k[p] * since, work.q[p] * since], axis=0).astype(dtype), S)
        left.append((segment_rows(v, p, own, work, tiling) - seen[:CHUNK]).astype(dtype))
        work.read[p] = seen[CHUNK:]
    for p in packs:
        T = work.T[p] * betas(p, own, marks, tiling)
        new.append(dot(T.astype(dtype), block_diagonal(split_heads(left[p], pack))).astype(dtype))
    for p in packs:
        keys = (work.k[p] * work.factors[p, -CHUNK:]).astype(dtype)
        written = jnp.concatenate(split_heads(keys, pack), axis=0).T
        out = dot(jnp.concatenate([work.qk[p], written], axis=0), block_diagonal(split_heads(new[p], pack)))
        lanes = tiling.lanes(o, p)
        # Another segment's visit may have written other rows of the same chunk.
        others = jnp.where(opens, 0, o[:, lanes].astype(jnp.float32))
        o[:, lanes] = (others + work.read[p] + out[:CHUNK]).astype(o.dtype)
        totals = split_heads(work.factors[p, -CHUNK - 1 : -CHUNK], pack)
        for h, written_values in enumerate(split_heads(out[CHUNK:], pack)):
            S = state[p * pack + h]
            for before in saved:
                before[p * pack + h] = S
            state[p * pack + h] = jnp.broadcast_to(totals[h], S.shape[::-1]).T * S + written_values
