"""Kimi Delta Attention as one Pallas kernel for TPUs (arXiv 2510.26692, section 3; formulas in `xla`)."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.kda import mosaic_scores as scores
from pallas_kernels.kda.mosaic_dots import CHUNK, block_diagonal, dot, dot_transposed, heads_of, split
from pallas_kernels.kda.mosaic_inverse import invert, second_halves
from pallas_kernels.kda.visits import visits

HEADS = 8


class Options(NamedTuple):
    """Heads of a step and of a pack, `mosaic_scores.base_block`, and the options of `api.kda`."""

    heads: int
    pack: int
    base: int
    normalize_qk: bool
    scale: float


class Scratch(NamedTuple):
    k: Any
    q: Any
    decays: Any
    products: Any
    A: Any
    T: Any
    qk: Any
    read: Any


def kda(q, k, v, g, beta, states, segment_ids, *, normalize, scale, lower_bound, interpret, group=HEADS):
    B, T, H, Dk = q.shape
    N, Dv = states.shape[1], v.shape[3]
    heads = max(n for n in range(1, group + 1) if H % n == 0)
    opt = Options(heads, 2 - heads % 2, scores.base_block(lower_bound), normalize, scale)
    packs, lanes = heads // opt.pack, opt.pack * CHUNK
    chunks = -(-T // CHUNK)
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    visit = visits(ids, N, CHUNK)
    marks = _marks(beta, ids, opt)
    parts = 2 if q.dtype == jnp.bfloat16 else 3
    sums = jnp.asarray(np.tile(scores.sum_weights(opt.base), (1, parts)), jnp.bfloat16)
    codes = jnp.asarray(scores.level_codes(opt.base, opt.pack))

    def tokens(D):
        return pl.BlockSpec((None, CHUNK, heads * D), lambda b, j, v, chunk, *_: (b, chunk[b, v], j))

    state = pl.BlockSpec((None, None, heads, Dk, Dv), lambda b, j, v, chunk, segment, *_: (b, segment[b, v], j, 0, 0))
    f32 = partial(pltpu.VMEM, dtype=jnp.float32)
    rows = sum(128 if s < 8 else 64 for s in scores.levels(opt.base)) + (64 if opt.base == 1 else 128)
    o, states = pl.pallas_call(
        partial(_kernel, opt=opt),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, H // heads, visit.chunk.shape[1]),
            in_specs=[
                pl.BlockSpec(sums.shape, lambda *_: (0, 0)),
                pl.BlockSpec(codes.shape, lambda *_: (0, 0)),
                tokens(Dk),
                tokens(Dk),
                tokens(Dv),
                tokens(Dk),
                pl.BlockSpec((None, None, None, packs + 1, lanes), lambda b, j, v, chunk, *_: (b, j, chunk[b, v], 0, 0)),
                state,
            ],
            out_specs=[tokens(Dv), state],
            scratch_shapes=[
                f32((packs, CHUNK, opt.pack * Dk)),
                f32((packs, CHUNK, opt.pack * Dk)),
                f32((packs, sums.shape[0] + CHUNK * len(scores.levels(max(opt.base, 8))), opt.pack * Dk)),
                f32((packs, rows, lanes)),
                f32((packs, CHUNK, lanes)),
                f32((packs, CHUNK, lanes)),
                pltpu.VMEM((packs, CHUNK, lanes), q.dtype),
                f32((packs, CHUNK, opt.pack * Dv)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, T, H * Dv), v.dtype), jax.ShapeDtypeStruct(states.shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        name="kda",
        interpret=interpret,
    )(*visit, sums, codes, *(x.reshape(B, T, -1) for x in (q, k, v, g)), marks, states)
    return o.reshape(B, T, H, Dv), states


def _marks(beta, ids, opt):
    """[B, groups, chunks, packs + 1, pack * 64]"""
    B, T, H = beta.shape
    chunks = -(-T // CHUNK)
    padding = [(0, 0), (0, chunks * CHUNK - T)]
    betas = jnp.pad(beta.astype(jnp.float32), [*padding, (0, 0)])
    betas = betas.reshape(B, chunks, CHUNK, H // opt.heads, opt.heads // opt.pack, opt.pack).transpose(0, 3, 1, 4, 5, 2)
    ids = jnp.pad(ids, padding, constant_values=-1).astype(jnp.float32).reshape(B, 1, chunks, 1, 1, CHUNK)
    ids = jnp.broadcast_to(ids, (B, H // opt.heads, chunks, 1, opt.pack, CHUNK))
    return jnp.concatenate([betas, ids], axis=3).reshape(B, H // opt.heads, chunks, -1, opt.pack * CHUNK)


def _kernel(chunk, segment, count, sums, codes, q, k, v, g, marks, initial, o, state, *scratch, opt):
    b, visit = pl.program_id(0), pl.program_id(2)
    before = jnp.maximum(visit - 1, 0)
    live = visit < count[b]
    begins = (visit == 0) | (segment[b, visit] != segment[b, before])
    opens = (visit == 0) | (chunk[b, visit] != chunk[b, before])
    own = segment[b, visit].astype(jnp.float32)
    packs = opt.heads // opt.pack
    at = Scratch(*scratch)

    @pl.when(live & begins)
    def _():
        def copy(h, _):
            state[h] = initial[h]

        lax.fori_loop(0, opt.heads, copy, None)

    @pl.when(live)
    def _():
        rows = marks[...]
        filled = jnp.concatenate([rows, jnp.zeros((-rows.shape[0] % 8, rows.shape[1]), jnp.float32)], axis=0)
        columns = filled.T
        mine = columns[:CHUNK, packs : packs + 1] == own
        betas = jnp.where(rows[packs:] == own, rows[:packs], 0)
        table = codes[...]
        for p in range(packs):
            load(p, q, k, mine, at, opt)
            decays(p, sums, g, mine, at, opt)
        for p in range(packs):
            products(p, at, opt, q.dtype)
        for p in range(packs):
            column = jnp.zeros((CHUNK, rows.shape[1]), jnp.float32)
            lane = lax.broadcasted_iota(jnp.int32, column.shape, 1) // CHUNK
            for h in range(opt.pack):
                column = jnp.where(lane == h, columns[h * CHUNK : (h + 1) * CHUNK, p : p + 1], column)
            assemble(p, column, table, at, opt)
        invert(at.A, at.T, opt.pack)
        outputs(v, state, o, betas, mine, opens, at, opt, q.dtype)


def lanes_of(ref, p, opt):
    width = ref.shape[1] // opt.heads * opt.pack
    return slice(p * width, (p + 1) * width)


def load(p, q, k, mine, at, opt):
    for ref, out in ((k, at.k), (q, at.q)):
        x = jnp.where(mine, ref[:, lanes_of(ref, p, opt)].astype(jnp.float32), 0)
        if opt.normalize_qk:
            x = jnp.concatenate(
                [y * lax.rsqrt(jnp.sum(y * y, axis=1, keepdims=True) + 1e-6) for y in heads_of(x, opt.pack)], axis=1
            )
        out[p] = x


def decays(p, sums, g, mine, at, opt):
    x = jnp.where(mine, g[:, lanes_of(g, p, opt)], 0) * scores.LOG2_E
    parts = sums.shape[1] // CHUNK
    d = jnp.exp2(dot(sums[...], jnp.concatenate(split(x, parts), axis=0)))
    high = d.shape[0] - 2 * CHUNK
    at.decays[p, :high] = d[:high]
    since, until = d[high : high + CHUNK], d[high + CHUNK :]
    for size in scores.levels(max(opt.base, 8)):
        joined, sinces, untils = [], [], []
        for b in range(0, CHUNK, 2 * size):
            first, second = slice(b, b + size), slice(b + size, b + 2 * size)
            joined += [until[first], since[second]]
            sinces += [since[first], since[second] * since[b + size - 1 : b + size]]
            untils += [until[first] * since[b + 2 * size - 1 : b + 2 * size], until[second]]
        at.decays[p, high : high + CHUNK] = jnp.concatenate(joined, axis=0)
        since, until = jnp.concatenate(sinces, axis=0), jnp.concatenate(untils, axis=0)
        high += CHUNK
    at.decays[p, high : high + CHUNK] = since
    at.decays[p, high + CHUNK : high + 2 * CHUNK] = until


def products(p, at, opt, dtype):
    row = 0
    k, q = at.k[p], at.q[p]

    def right(x):
        return block_diagonal(heads_of(x.astype(dtype), opt.pack))

    decay_row = 0
    def decay():
        nonlocal decay_row
        decay_row += CHUNK
        return at.decays[p, decay_row - CHUNK : decay_row]
    def put(r):
        nonlocal row
        at.products[p, row : row + r.shape[0]] = r
        row += r.shape[0]

    for size in scores.levels(opt.base):
        if size < 8:
            d = decay()
            kd = k * d
            put(dot_transposed(jnp.concatenate([kd, q * d], axis=0).astype(dtype), right(kd)))
    if opt.base == 1:
        put(dot_transposed(q.astype(dtype), right(k)))
    else:
        d = decay()
        put(dot_transposed(jnp.concatenate([k * d, q * d], axis=0).astype(dtype), right(k * decay())))
    for size in scores.levels(opt.base):
        if size >= 8:
            d = decay()
            kd = k * d
            left = [second_halves(kd, size), second_halves(q, size) * second_halves(d, size)]
            put(dot_transposed(jnp.concatenate(left, axis=0).astype(dtype), right(kd)))


def assemble(p, column, table, at, opt):
    for r in range(0, CHUNK, 8):
        code = table[r : r + 8]
        A = jnp.zeros(code.shape, jnp.float32)
        qk = A
        row = 0
        for size in scores.levels(opt.base):
            if size < 8:
                A = jnp.where(code == size, at.products[p, row + r : row + r + 8], A)
                qk = jnp.where(code == size, at.products[p, row + CHUNK + r : row + CHUNK + r + 8], qk)
                row += 2 * CHUNK
        if opt.base > 1:
            A = jnp.where(code == 1, at.products[p, row + r : row + r + 8], A)
            row += CHUNK
        qk = jnp.where(code < opt.base, at.products[p, row + r : row + r + 8], qk)
        row += CHUNK
        for size in scores.levels(opt.base):
            if size >= 8:
                if r % (2 * size) >= size:
                    i = row + r // (2 * size) * size + r % size
                    A = jnp.where(code == size, at.products[p, i : i + 8], A)
                    qk = jnp.where(code == size, at.products[p, i + 32 : i + 40], qk)
                row += CHUNK
        at.A[p, r : r + 8] = column[r : r + 8] * A
        at.qk[p, r : r + 8] = qk.astype(at.qk.dtype)


def outputs(v, state, o, betas, mine, opens, at, opt, dtype):
    packs = range(opt.heads // opt.pack)
    end = at.decays.shape[1]
    rest = []
    for p in packs:
        prefix = at.decays[p, end - 2 * CHUNK : end - CHUNK]
        S = block_diagonal([state[p * opt.pack + h].astype(dtype) for h in range(opt.pack)])
        seen = dot(jnp.concatenate([at.k[p] * prefix, at.q[p] * prefix], axis=0).astype(dtype), S)
        at.read[p] = seen[CHUNK:]
        values = jnp.where(mine, v[:, lanes_of(v, p, opt)].astype(jnp.float32), 0)
        rest.append((values - seen[:CHUNK]).astype(dtype))
    new = []
    for p in packs:
        T = (at.T[p] * betas[p : p + 1]).astype(dtype)
        new.append(dot(T, block_diagonal(heads_of(rest[p], opt.pack))).astype(dtype))
    for p in packs:
        suffix = at.decays[p, end - CHUNK :]
        written = jnp.concatenate(heads_of((at.k[p] * suffix).astype(dtype), opt.pack), axis=0).T
        out = dot(jnp.concatenate([at.qk[p], written], axis=0), block_diagonal(heads_of(new[p], opt.pack)))
        y = (at.read[p] + out[:CHUNK]) * opt.scale
        lanes = lanes_of(o, p, opt)
        o[:, lanes] = (jnp.where(opens, 0, o[:, lanes].astype(jnp.float32)) + y).astype(o.dtype)
        last = heads_of(at.decays[p, end - CHUNK - 1 : end - CHUNK], opt.pack)
        for h, update in enumerate(heads_of(out[CHUNK:], opt.pack)):
            S = state[p * opt.pack + h]
            decay = jnp.broadcast_to(last[h], (S.shape[1], S.shape[0])).T
            state[p * opt.pack + h] = decay * S + update
