"""Kimi Delta Attention of many tokens as one Pallas kernel for TPUs (arXiv 2510.26692, section 3; formulas in `xla`).

A grid step is a visit: a chunk of 64 tokens and one of the segments in it (`visits`), for up to 16 heads.
Projections are read as they come, [B, T, H * D], heads along the lanes; tokens of other segments and padding enter as
zeros, with which a chunk leaves the state as it is. The float32 state stays in vector memory, in its output block, for
all visits of a segment. Every part of the work is done for all packs of heads (`mosaic_blocks`) before the next
part, so that the matrix unit, whose results take some hundred cycles, always has another pack to go on with;
intermediate results wait in scratch memory.

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
from pallas_kernels.kda.mosaic_inverse import invert
from pallas_kernels.kda.visits import chunk_visits

# Key and value channels of all heads in a step: 16 heads of 128 and 128.
MOST_CHANNELS = 4096


class KdaTiling(NamedTuple):
    """Heads of a step and of a pack, tokens of a base block (`mosaic_scores.base_block`), and options of `api.kda`."""

    heads: int
    pack: int
    base: int
    normalize_qk: bool
    scale: float


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


def heads_per_step(total: int, Dk: int, Dv: int) -> int:
    """Returns the number of heads, out of `total`, that a grid step takes."""
    return max(n for n in range(1, total + 1) if total % n == 0 and (n == 1 or n * (Dk + Dv) <= MOST_CHANNELS))


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
    interpret: Any,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B N H Dk Dv"]]:
    """Returns outputs in v's dtype and the states after each segment; arguments are those of `xla.chunked`."""
    (batch, tokens, total, Dk), Dv = q.shape, v.shape[3]
    heads = heads_per_step(total, Dk, Dv)
    tiling = KdaTiling(heads, 2 - heads % 2, scores.base_block(lower_bound), normalize_qk, scale)
    packs, lanes = heads // tiling.pack, tiling.pack * CHUNK
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, tokens), jnp.int32)
    visit = chunk_visits(segment_ids, states.shape[1], CHUNK)
    weights = np.tile(scores.sum_weights(tiling.base), (1, 2 if q.dtype == jnp.bfloat16 else 3))
    codes = scores.level_codes(tiling.base, tiling.pack)

    def constant(array: np.ndarray) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0, 0))

    def token(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, CHUNK, heads * width), lambda b, j, n, chunk, *_: (b, chunk[b, n], j))

    marks = pl.BlockSpec((None, None, None, packs + 1, lanes), lambda b, j, n, chunk, *_: (b, j, chunk[b, n], 0, 0))
    state = pl.BlockSpec((None, None, heads, Dk, Dv), lambda b, j, n, _, segment, *__: (b, segment[b, n], j, 0, 0))

    def scratch(rows: int, width: int, dtype: Any = jnp.float32) -> Any:
        return pltpu.VMEM((packs, rows, width), dtype)

    o, states = pl.pallas_call(
        partial(_kernel, tiling=tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, total // heads, visit.chunk.shape[1]),
            in_specs=[constant(weights), constant(codes), *map(token, (Dk, Dk, Dv, Dk)), marks, state],
            out_specs=[token(Dv), state],
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
        _marks(beta, segment_ids, tiling),
        states,
    )
    return o.reshape(v.shape), states


def _marks(
    beta: Float[Array, "B T H"], segment_ids: Int[Array, "B T"], tiling: KdaTiling
) -> Float[Array, "B groups chunks rows P64"]:
    """Returns, for each chunk, a row of betas of each pack and a row of segment ids (float32, exact up to 2^24).

    Tokens are along the lanes: columns would be padded to 128 lanes in memory.
    """
    batch, tokens, total = beta.shape
    groups, chunks = total // tiling.heads, -(-tokens // CHUNK)
    padding = [(0, 0), (0, chunks * CHUNK - tokens)]
    betas = jnp.pad(beta.astype(jnp.float32), [*padding, (0, 0)])
    betas = betas.reshape(batch, chunks, CHUNK, groups, -1, tiling.pack).transpose(0, 3, 1, 4, 5, 2)
    ids = jnp.pad(segment_ids, padding, constant_values=-1).astype(jnp.float32)
    ids = jnp.broadcast_to(ids.reshape(batch, 1, chunks, 1, 1, CHUNK), (batch, groups, chunks, 1, tiling.pack, CHUNK))
    return jnp.concatenate([betas, ids], axis=3).reshape(batch, groups, chunks, -1, tiling.pack * CHUNK)


def _kernel(
    chunk, segment, total, weights, codes, q, k, v, g, marks, initial, o, state, *scratch, tiling: KdaTiling
) -> None:
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
        work.ids[...] = jnp.broadcast_to(marks[tiling.heads // tiling.pack :], (LANES, marks.shape[1])).T[:CHUNK]
        _operands(own, q, k, g, weights, work, tiling)
        _matrices(own, marks, codes, work, tiling, q.dtype)
        invert(work.A, work.T, tiling.pack)
        _outputs(own, opens, v, marks, o, state, work, tiling)


def _operands(own, q, k, g, weights, work: KdaScratch, tiling: KdaTiling) -> None:
    """Writes keys, queries and decay factors to scratch."""
    for p in range(tiling.heads // tiling.pack):
        keys, queries, decay = (_segment_rows(ref, p, own, work, tiling) for ref in (k, q, g))
        if tiling.normalize_qk:
            keys, queries = (_normalized(array, tiling.pack) for array in (keys, queries))
        work.k[p], work.q[p] = keys, tiling.scale * queries
        work.factors[p] = scores.decay_factors(decay, weights[...], tiling.base)


def _matrices(own, marks, codes, work: KdaScratch, tiling: KdaTiling, dtype: Any) -> None:
    """Writes A (decayed k k^T scaled by beta) and Aqk to scratch."""
    packs, lanes = tiling.heads // tiling.pack, marks.shape[1]
    for p in range(packs):
        work.products[p] = scores.products(work.k[p], work.q[p], work.factors[p], tiling.base, tiling.pack, dtype)
    head = lax.broadcasted_iota(jnp.int32, (CHUNK, lanes), 1) // CHUNK
    for p in range(packs):
        keys, queries = scores.select(work.products[p], codes[...], tiling.base)
        columns = jnp.broadcast_to(_betas(p, own, marks, tiling), (lanes, lanes)).T
        beta = columns[:CHUNK]
        for h in range(1, tiling.pack):
            beta = jnp.where(head == h, columns[h * CHUNK : (h + 1) * CHUNK], beta)
        work.A[p], work.qk[p] = beta * keys, queries.astype(dtype)


def _outputs(own, opens, v, marks, o, state, work: KdaScratch, tiling: KdaTiling) -> None:
    """Writes the outputs and the state after the chunk."""
    packs, pack, dtype = range(tiling.heads // tiling.pack), tiling.pack, v.dtype
    left, new = [], []
    for p in packs:
        since = work.factors[p, -2 * CHUNK : -CHUNK]
        S = block_diagonal([state[p * pack + h].astype(dtype) for h in range(pack)])
        seen = dot(jnp.concatenate([work.k[p] * since, work.q[p] * since], axis=0).astype(dtype), S)
        left.append((_segment_rows(v, p, own, work, tiling) - seen[:CHUNK]).astype(dtype))
        work.read[p] = seen[CHUNK:]
    for p in packs:
        T = work.T[p] * _betas(p, own, marks, tiling)
        new.append(dot(T.astype(dtype), block_diagonal(split_heads(left[p], pack))).astype(dtype))
    for p in packs:
        keys = (work.k[p] * work.factors[p, -CHUNK:]).astype(dtype)
        written = jnp.concatenate(split_heads(keys, pack), axis=0).T
        out = dot(jnp.concatenate([work.qk[p], written], axis=0), block_diagonal(split_heads(new[p], pack)))
        lanes = _lanes(o, p, tiling)
        # Another segment's visit may have written other rows of the same chunk.
        others = jnp.where(opens, 0, o[:, lanes].astype(jnp.float32))
        o[:, lanes] = (others + work.read[p] + out[:CHUNK]).astype(o.dtype)
        totals = split_heads(work.factors[p, -CHUNK - 1 : -CHUNK], pack)
        for h, written_values in enumerate(split_heads(out[CHUNK:], pack)):
            S = state[p * pack + h]
            state[p * pack + h] = jnp.broadcast_to(totals[h], S.shape[::-1]).T * S + written_values


def _lanes(ref: Any, p: int, tiling: KdaTiling) -> slice:
    """Returns the lanes of a pack in a block [64, heads * width]."""
    width = ref.shape[1] // tiling.heads * tiling.pack
    return slice(p * width, (p + 1) * width)


def _betas(p: int, own: Array, marks: Any, tiling: KdaTiling) -> Float[Array, "1 P64"]:
    """Returns a pack's betas, with zeros for tokens of other segments."""
    return jnp.where(marks[tiling.heads // tiling.pack :] == own.astype(jnp.float32), marks[p : p + 1], 0)


def _segment_rows(ref: Any, p: int, own: Array, work: KdaScratch, tiling: KdaTiling) -> Float[Array, "64 PD"]:
    """Returns a pack's rows in float32, with zeros for tokens of other segments."""
    x = ref[:, _lanes(ref, p, tiling)].astype(jnp.float32)
    ids = jnp.concatenate([work.ids[...]] * (x.shape[1] // LANES), axis=1)
    return jnp.where(ids == own.astype(jnp.float32), x, 0)


def _normalized(x: Float[Array, "64 PD"], pack: int) -> Float[Array, "64 PD"]:
    heads = [y * lax.rsqrt(jnp.sum(y * y, axis=1, keepdims=True) + 1e-6) for y in split_heads(x, pack)]
    return jnp.concatenate(heads, axis=1)
