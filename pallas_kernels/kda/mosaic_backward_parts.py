"""The parts of a visit in the gradient kernel, each for all packs of heads; formulas in `mosaic_backward`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.hardware import LANES, SUBLANES
from pallas_kernels.kda import mosaic_score_gradients as score_gradients
from pallas_kernels.kda import mosaic_scores as scores
from pallas_kernels.kda.mosaic_blocks import CHUNK, block_diagonal, dot, dot_transposed, split_bf16, split_heads
from pallas_kernels.kda.mosaic_chunk import (
    KdaTiling,
    beta_columns,
    betas,
    keep_segment,
    read_operands,
    segment_rows,
    side_by_side,
)


class GradientScratch(NamedTuple):
    """Scratch memory: that of the forward kernel; then for each pack decayed k k^T, dO, V - K' S, V', N, the gradients
    of decayed products, of keys and of queries, and the bf16 parts of the gradients of exponents."""

    ids: Any
    k: Any
    q: Any
    factors: Any
    products: Any
    A: Any
    T: Any
    qk: Any
    kk: Any
    do: Any
    left: Any
    new: Any
    negated: Any
    products_gradient: Any
    dk: Any
    dq: Any
    exponents: Any


def write_products(p: int, own, q, k, g, weights, work: GradientScratch, tiling: KdaTiling) -> Iterator[None]:
    """Writes a pack's keys, queries, decay factors and decayed products to scratch."""
    work.k[p], work.q[p], decay = read_operands(p, own, q, k, g, work, tiling)
    sums = scores.decay_sums(decay, weights[...])
    yield
    work.factors[p] = scores.decay_factors(sums, tiling.base)
    yield
    work.products[p] = scores.products(work.k[p], work.q[p], work.factors[p], tiling.base, tiling.pack, q.dtype)


def write_scores(own, marks, codes, work: GradientScratch, tiling: KdaTiling, dtype: Any) -> None:
    """Writes A, decayed k k^T and Aqk to scratch."""
    for p in range(tiling.packs):
        keys, queries = scores.select(work.products[p], codes[...], 1)
        work.A[p] = side_by_side(beta_columns(p, own, marks, tiling)) * keys
        work.kk[p], work.qk[p] = keys.astype(dtype), queries.astype(dtype)


def write_values(own, v, do, marks, saved, work: GradientScratch, tiling: KdaTiling) -> None:
    """Writes V - K' S, dO and V' to scratch."""
    packs, pack, dtype = range(tiling.packs), tiling.pack, v.dtype
    for p in packs:
        S = block_diagonal([saved[p * pack + h].astype(dtype) for h in range(pack)])
        keys = (work.k[p] * _since(work, p)).astype(dtype)
        work.left[p] = segment_rows(v, p, own, work, tiling) - dot(keys, S)
        work.do[p] = segment_rows(do, p, own, work, tiling).astype(dtype)
    for p in packs:
        T = work.T[p] * betas(p, own, marks, tiling)
        left = block_diagonal(split_heads(work.left[p].astype(dtype), pack))
        work.new[p] = dot(T.astype(dtype), left).astype(dtype)


def write_value_gradients(own, opens, marks, dstate, dv, dbeta, work: GradientScratch, tiling: KdaTiling) -> None:
    """Writes dV and dbeta, and N to scratch."""
    packs, pack, dtype = range(tiling.packs), tiling.pack, dv.dtype
    given, solved = [], []
    for p in packs:
        keys = (work.k[p] * work.factors[p, -CHUNK:]).astype(dtype)
        dS = block_diagonal([dstate[p * pack + h].astype(dtype) for h in range(pack)])
        given.append((_own_products(work.qk[p].T, work.do[p], pack) + dot(keys, dS)).astype(dtype))
    for p in packs:
        solved.append(_own_products(work.T[p].astype(dtype).T, given[p], pack))
    lane = lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 1)
    columns = jnp.zeros((CHUNK, LANES), jnp.float32)
    for p in packs:
        Y, lanes = solved[p], tiling.lanes(dv, p)
        copies = Y.shape[1] // pack // LANES
        beta = jnp.concatenate([b for b in beta_columns(p, own, marks, tiling) for _ in range(copies)], axis=1)
        gradient = beta * Y
        dv[:, lanes] = _add(opens, dv[:, lanes], gradient)
        work.negated[p] = (-gradient).astype(dtype)
        error = work.left[p] - dot(work.kk[p], block_diagonal(split_heads(work.new[p], pack)))
        for h, product in enumerate(split_heads(Y * error, pack)):
            columns = jnp.where(lane == p * pack + h, jnp.sum(product, axis=1, keepdims=True), columns)
    dbeta[...] = _add(opens, dbeta[...], keep_segment(columns, own, work)[:, : tiling.heads])


def write_product_gradients(work: GradientScratch, tiling: KdaTiling) -> None:
    """Writes the gradients of decayed products, as `mosaic_score_gradients` takes them, and of the diagonal of Aqk."""
    pack = tiling.pack
    shape = (CHUNK, 2 * pack * CHUNK)
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    below = row > lane % (2 * CHUNK)
    for p in range(tiling.packs):
        new, negated, do = work.new[p], work.negated[p], work.do[p]
        rows = dot_transposed(
            jnp.concatenate([negated, do], axis=0), score_gradients.stack_heads(new, jnp.zeros_like(new), pack)
        )
        columns = dot_transposed(new, score_gradients.stack_heads(negated, do, pack))
        work.products_gradient[p, :CHUNK] = jnp.where(below, rows[:CHUNK], columns)
        work.products_gradient[p, CHUNK:] = rows[CHUNK:]
        k, q = split_heads(work.k[p], pack), split_heads(work.q[p], pack)
        products = split_heads(do.astype(jnp.float32) * new.astype(jnp.float32), pack)
        diagonal = [jnp.sum(product, axis=1, keepdims=True) for product in products]
        work.dk[p] = jnp.concatenate([d * x for d, x in zip(diagonal, q, strict=True)], axis=1)
        work.dq[p] = jnp.concatenate([d * x for d, x in zip(diagonal, k, strict=True)], axis=1)


def write_state_gradients(saved, dstate, work: GradientScratch, tiling: KdaTiling, parts: int) -> None:
    """Writes dS, and adds what keys, queries and exponents have of the states before and after the chunk."""
    pack, dtype = tiling.pack, work.do.dtype
    for p in range(tiling.packs):
        since, until = _since(work, p), work.factors[p, -CHUNK:]
        keys, queries = work.k[p] * since, work.q[p] * since
        heads = range(p * pack, (p + 1) * pack)
        S = block_diagonal([saved[h].astype(dtype) for h in heads])
        given = block_diagonal([dstate[h].astype(dtype) for h in heads])
        both = jnp.concatenate([work.do[p], work.negated[p]], axis=0)
        read = dot_transposed(both, S)
        written = until * dot_transposed(work.new[p], given)
        dq, dk = since * read[:CHUNK], since * read[CHUNK:]
        work.dq[p] += dq
        work.dk[p] += dk + written
        kept = jnp.concatenate([saved[h] * dstate[h] for h in heads], axis=0).astype(dtype)
        kept = dot_transposed(jnp.ones((SUBLANES, kept.shape[1]), dtype), kept)[:1] * since[-1:]
        # The decay of the state is the decay up to the last token.
        row = lax.broadcasted_iota(jnp.int32, since.shape, 0)
        up_to = work.k[p] * dk + work.q[p] * dq + jnp.where(row == CHUNK - 1, kept, 0)
        _put_exponents(work, p, score_gradients.EXPONENTS - 2, up_to, parts)
        _put_exponents(work, p, score_gradients.EXPONENTS - 1, work.k[p] * written, parts)
        pairs = zip(split_heads(keys.astype(dtype), pack), split_heads(queries.astype(dtype), pack), strict=True)
        left = jnp.concatenate([x for pair in pairs for x in pair], axis=0).T
        out = dot(left, score_gradients.stack_heads(work.negated[p], work.do[p], pack))
        totals = split_heads(since[-1:], pack)
        for h, gradient in enumerate(split_heads(out, pack)):
            dS = dstate[p * pack + h]
            dstate[p * pack + h] = jnp.broadcast_to(totals[h], dS.shape[::-1]).T * dS + gradient


def add_level_gradients(codes, work: GradientScratch, tiling: KdaTiling, parts: int, dtype: Any) -> None:
    """Adds the gradients of decayed products to those of keys, queries and exponents."""
    for level, size in enumerate(score_gradients.LEVELS):
        for p in range(tiling.packs):
            factor = work.factors[p, level * CHUNK : (level + 1) * CHUNK]
            dk, dq, exponents = score_gradients.level_gradients(
                work.k[p], work.q[p], factor, work.products_gradient[p], codes[...], size, tiling.pack, dtype
            )
            work.dk[p] += dk
            work.dq[p] += dq
            _put_exponents(work, p, level, exponents, parts)


def write_gradients(own, opens, q, k, exponent_weights, dq, dk, dg, work: GradientScratch, tiling: KdaTiling) -> None:
    """Writes dq, dk and dg."""
    for p in range(tiling.packs):
        lanes = tiling.lanes(dg, p)
        gradient = keep_segment(dot(exponent_weights[...], work.exponents[p]), own, work)
        dg[:, lanes] = _add(opens, dg[:, lanes], gradient)
        for out, ref, found, scale in ((dq, q, work.dq[p], tiling.scale), (dk, k, work.dk[p], 1.0)):
            gradient = scale * found
            if tiling.normalize_qk:
                x = segment_rows(ref, p, own, work, tiling)
                gradient = _through_norm(x, gradient, tiling.pack)
            out[:, lanes] = _add(opens, out[:, lanes], gradient)


def _since(work: GradientScratch, p: int) -> Float[Array, "64 PD"]:
    return work.factors[p, -2 * CHUNK : -CHUNK]


def _own_products(left: Float[Array, "P64 c"], right: Float[Array, "c PD"], pack: int) -> Float[Array, "64 PD"]:
    """Multiplies each head's rows of `left` by its lanes of `right`."""
    out = dot(left, right)
    heads = split_heads(out, pack)
    return jnp.concatenate([heads[h][h * CHUNK : (h + 1) * CHUNK] for h in range(pack)], axis=1)


def _put_exponents(work: GradientScratch, p: int, at: int, gradient: Float[Array, "64 PD"], parts: int) -> None:
    for n, part in enumerate(split_bf16(gradient, parts)):
        row = (n * score_gradients.EXPONENTS + at) * CHUNK
        work.exponents[p, row : row + CHUNK] = part


def _through_norm(x: Float[Array, "64 PD"], gradient: Float[Array, "64 PD"], pack: int) -> Float[Array, "64 PD"]:
    """Returns the gradient of x, from that of x / sqrt(sum of squares + 1e-6) of each head."""
    out = []
    for y, d in zip(split_heads(x, pack), split_heads(gradient, pack), strict=True):
        inverse = lax.rsqrt(jnp.sum(y * y, axis=1, keepdims=True) + 1e-6)
        unit = y * inverse
        out.append(inverse * (d - unit * jnp.sum(unit * d, axis=1, keepdims=True)))
    return jnp.concatenate(out, axis=1)


def _add(opens: Array, others: Float[Array, "64 n"], gradient: Float[Array, "64 n"]) -> Float[Array, "64 n"]:
    """Returns the rows to write: another segment's visit may have written other rows of the same chunk."""
    return (jnp.where(opens, 0, others.astype(jnp.float32)) + gradient).astype(others.dtype)
