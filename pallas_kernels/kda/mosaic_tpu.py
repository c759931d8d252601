"""Kimi Delta Attention of many tokens as one Pallas kernel for TPUs (arXiv 2510.26692, section 3; formulas in `xla`).

A grid step is a visit (`mosaic_chunk`) for up to 16 heads. Projections are read as they come, [B, T, H * D], heads
along the lanes. The float32 state stays in vector memory for all visits of a segment, transposed, so that a channel's
decay is a lane's. Every part of the work is done for all packs of heads (`mosaic_blocks`) before the next part, so that
the matrix unit, whose results take some hundred cycles, always has another pack to go on with; intermediate results
wait in scratch memory. The compiler keeps close to the order in which packs are taken (`_advance`).

With S the state, G the running log decay, A and Aqk the decayed products (`mosaic_scores`), and B = diag(beta),
T = (I + A B)^-1:
    W = T (V - (exp(G) K) S);   O = (exp(G) Q) S + Aqk B W;   S <- exp(G_C) S + (exp(G_C - G) K)^T B W,
where T is applied once, to the part of V that the state does not explain. (B W is the V' of `xla`, where beta scales
rows; here it only ever scales columns, along which it lies.) Products are of bf16 operands if q, k and v are bf16, of
full float32 if they are float32; T is computed to float32 in either case, and so is everything outside of products.

Spills: the compiler begins many packs at once, and values that do not fit in registers wait in memory, beside the
scratch (some 470 stores and loads per head on v6e, in slots that nothing else uses).
"""

import math
from collections.abc import Iterator
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
from pallas_kernels.kda.mosaic_blocks import CHUNK, block_diagonal, dot, dot_transposed, split_heads
from pallas_kernels.kda.mosaic_chunk import (
    KdaTiling,
    betas,
    heads_per_step,
    marks,
    read_operands,
    segment_rows,
    stagger,
    write_segments,
)
from pallas_kernels.kda.mosaic_inverse import STEPS, begin_inverse
from pallas_kernels.kda.visits import chunk_visits

# Key and value channels of all heads in a step: 16 heads of 128 and 128.
MOST_CHANNELS = 4096
# Heads whose states are transposed at a time where a segment begins or ends.
HEADS_TRANSPOSED = 8


class KdaScratch(NamedTuple):
    """Scratch memory: each token's segment along its row; then for each pack the products of `mosaic_scores`, A B, T,
    and Aqk B; the keys and queries that read the state, the values less what the state explains, the values that
    queries read, and W; the keys that write to the state, its decay; and the state of each head, transposed."""

    ids: Any
    products: Any
    A: Any
    T: Any
    qk: Any
    reading: Any
    left: Any
    read: Any
    solved: Any
    writing: Any
    total: Any
    state: Any


class _Visit(NamedTuple):
    """The segment of a visit, whether the visit is the first of its chunk, and what it works on: blocks of arguments
    and results, the states before each visit (a ref or none), scratch and tiling."""

    own: Any
    opens: Any
    weights: Any
    codes: Any
    q: Any
    k: Any
    v: Any
    g: Any
    marks: Any
    o: Any
    saved: tuple[Any, ...]
    work: KdaScratch
    tiling: KdaTiling

    @property
    def dtype(self) -> Any:
        """The dtype of products' operands."""
        return self.q.dtype

    def betas(self, p: int) -> Float[Array, "1 P64"]:
        """Returns the betas of pack p."""
        return betas(p, self.own, self.marks, self.tiling)


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
                products=scratch(scores.num_products(tiling.base), lanes),
                A=scratch(CHUNK, lanes),
                T=scratch(CHUNK, lanes),
                qk=scratch(CHUNK, lanes, q.dtype),
                reading=scratch(2 * CHUNK, tiling.pack * Dk, q.dtype),
                left=scratch(CHUNK, tiling.pack * Dv, q.dtype),
                read=scratch(CHUNK, tiling.pack * Dv),
                solved=scratch(CHUNK, tiling.pack * Dv),
                writing=scratch(CHUNK, tiling.pack * Dk, q.dtype),
                total=scratch(1, tiling.pack * Dk),
                state=pltpu.VMEM((heads, Dv, Dk), jnp.float32),
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
    saved, work = rest[:visit_states], KdaScratch(*rest[visit_states:])
    batch, visit = pl.program_id(0), pl.program_id(2)
    before, after = jnp.maximum(visit - 1, 0), jnp.minimum(visit + 1, pl.num_programs(2) - 1)
    live = visit < total[batch]
    own = segment[batch, visit]
    begins = (visit == 0) | (own != segment[batch, before])
    ends = (visit == total[batch] - 1) | (own != segment[batch, after])
    opens = (visit == 0) | (chunk[batch, visit] != chunk[batch, before])

    @pl.when(live & begins)
    def _begin() -> None:
        _transpose(initial, work.state)

    @pl.when(live)
    def _advance_state() -> None:
        write_segments(marks, work, tiling)
        _advance(_Visit(own, opens, weights, codes, q, k, v, g, marks, o, saved, work, tiling))

    @pl.when(live & ends)
    def _end() -> None:
        _transpose(work.state, state)


def _transpose(states: Any, out: Any) -> None:
    """Writes the transpose of each head's state, some heads at a time."""
    group = math.gcd(states.shape[0], HEADS_TRANSPOSED)

    def transpose(at: Array, _: None) -> None:
        for h in range(group):
            out[at * group + h] = states[at * group + h].T

    lax.fori_loop(0, states.shape[0] // group, transpose, None)


def _advance(visit: _Visit) -> None:
    """Writes the outputs, the state before the chunk into `saved`, and the state after it.

    What packs read from the state waits for nothing else: it is computed where inverses wait for their products.
    """
    packs, inverses = range(visit.tiling.packs), []
    stagger([_write_products(visit, p) for p in packs])
    for p in packs:
        _write_scores(visit, p)
        inverses.append(begin_inverse(visit.work.A, visit.work.T, p))
    for turn in range(STEPS * len(packs)):
        next(inverses[turn % len(packs)], None)
        if turn % STEPS == STEPS - 1:
            _read_state(visit, turn // STEPS)
    for p in packs:
        left = split_heads(visit.work.left[p], visit.tiling.pack)
        visit.work.solved[p] = dot(visit.work.T[p].astype(visit.dtype), block_diagonal(left))
    for p in packs:
        _write_outputs(visit, p)


def _write_products(visit: _Visit, p: int) -> Iterator[None]:
    """Writes a pack's decayed products, the keys and queries that read the state, and the keys that write to it."""
    work, tiling, dtype = visit.work, visit.tiling, visit.dtype
    keys, queries, decay = read_operands(p, visit.own, visit.q, visit.k, visit.g, work, tiling)
    sums = scores.decay_sums(decay, visit.weights[...])
    yield
    factors = scores.decay_factors(sums, tiling.base)
    yield
    work.products[p] = scores.products(keys, queries, factors, tiling.base, tiling.pack, dtype)
    since, until = factors[-2 * CHUNK : -CHUNK], factors[-CHUNK:]
    work.reading[p] = jnp.concatenate([keys * since, queries * since], axis=0).astype(dtype)
    work.writing[p] = (keys * until).astype(dtype)
    work.total[p] = since[-1:]


def _write_scores(visit: _Visit, p: int) -> None:
    """Writes a pack's A B and Aqk B."""
    keys, queries = scores.select(visit.work.products[p], visit.codes[...], visit.tiling.base)
    visit.work.A[p] = visit.betas(p) * keys
    visit.work.qk[p] = (visit.betas(p) * queries).astype(visit.dtype)


def _read_state(visit: _Visit, p: int) -> None:
    """Writes what a pack's queries read from the state, and its values less what the state explains."""
    work, tiling = visit.work, visit.tiling
    heads = range(p * tiling.pack, (p + 1) * tiling.pack)
    S = block_diagonal([work.state[h].astype(visit.dtype) for h in heads])
    seen = dot_transposed(work.reading[p], S)
    work.left[p] = (segment_rows(visit.v, p, visit.own, work, tiling) - seen[:CHUNK]).astype(visit.dtype)
    work.read[p] = seen[CHUNK:]


def _write_outputs(visit: _Visit, p: int) -> None:
    """Writes a pack's outputs and states."""
    work, tiling, dtype = visit.work, visit.tiling, visit.dtype
    solved = split_heads(work.solved[p], tiling.pack)
    out = dot(work.qk[p], block_diagonal([W.astype(dtype) for W in solved]))
    lanes = tiling.lanes(visit.o, p)
    # Another segment's visit may have written other rows of the same chunk.
    others = jnp.where(visit.opens, 0, visit.o[:, lanes].astype(jnp.float32))
    visit.o[:, lanes] = (others + work.read[p] + out).astype(visit.o.dtype)
    values = (jnp.concatenate(solved, axis=0).T * visit.betas(p)).astype(dtype)
    written = dot(values, block_diagonal(split_heads(work.writing[p], tiling.pack)))
    totals = split_heads(work.total[p], tiling.pack)
    for h, written_values in enumerate(split_heads(written, tiling.pack)):
        S = work.state[p * tiling.pack + h]
        for before in visit.saved:
            before[p * tiling.pack + h] = S.T
        work.state[p * tiling.pack + h] = totals[h] * S + written_values
