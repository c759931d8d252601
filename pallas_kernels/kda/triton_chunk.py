"""The part of KDA that needs no state, as a Pallas kernel for NVIDIA GPUs: each chunk's scores, and the inverse.

With the words of `kda.xla`: T = (I + A)^-1 and Aqk of a chunk of 64 tokens and one head, and q, k and the chunk's whole
decay as the state meets them. Products under decay split the chunk as `kda.decays` does, so that nothing overflows and
nothing cancels; each level is one product of all tokens of a half of the chunk. (I + A) is inverted in blocks of 8 by
products of powers, since the eighth power of a block is zero, and pairs of blocks are merged: T <- T - T F T with F the
part of A between them. Halves, and some channels at a time, leave registers enough.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.kda.triton_step import norm_factor
from pallas_kernels.triton_products import make_dot

CHUNK, HALF, LEAST = 64, 32, 8
# Channels worked on at a time: the arrays of more would not stay in registers.
CHANNELS = 16


def _chunk(
    order_ref: Any,
    first_ref: Any,
    count_ref: Any,
    q_ref: Any,
    k_ref: Any,
    g_ref: Any,
    beta_ref: Any,
    T_ref: Any,
    Aqk_ref: Any,
    since_ref: Any,
    read_ref: Any,
    written_ref: Any,
    total_ref: Any,
    *,
    normalize_qk: bool,
    scale: float,
    interpret: bool,
) -> None:
    h, c, b = (pl.program_id(axis) for axis in range(3))
    dot = make_dot(interpret)
    score, solve = (partial(dot, dtype=dtype) for dtype in (q_ref.dtype, jnp.float32))
    token, is_token = _tokens(order_ref, first_ref[b, c], count_ref[b, c], b, 0, CHUNK)
    width = q_ref.shape[3]
    at_once = min(CHANNELS, width)

    def take(ref: Any, start: Array | int, many: int) -> Array:
        return take_columns(ref, b, token, h, start + jnp.arange(many, dtype=jnp.int32), is_token)

    q_factor, k_factor = jnp.full((CHUNK,), scale, jnp.float32), jnp.ones((CHUNK,), jnp.float32)
    if normalize_qk:
        q_factor, k_factor = scale * norm_factor(take(q_ref, 0, width)), norm_factor(take(k_ref, 0, width))

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start = i * at_once
        q, k, g = (take(ref, start, at_once) for ref in (q_ref, k_ref, g_ref))
        q, k = q_factor[:, None] * q, k_factor[:, None] * k
        scores = decayed_products(q, k, g, score)
        columns, since = pl.ds(start, at_once), jnp.exp(scores.prefix)
        since_ref[:, columns] = (since * k).astype(since_ref.dtype)
        read_ref[:, columns] = (since * q).astype(read_ref.dtype)
        written_ref[:, columns] = (jnp.exp(scores.suffix) * k).astype(written_ref.dtype)
        total_ref[columns] = jnp.exp(jnp.sum(g, axis=0))
        return sums[0] + scores.qk, sums[1] + scores.kk

    zeros = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    qk, kk = lax.fori_loop(0, width // at_once, add, (zeros, zeros))
    Aqk_ref[...] = qk.astype(Aqk_ref.dtype)
    tokens = [_tokens(order_ref, first_ref[b, c], count_ref[b, c], b, half * HALF, HALF) for half in range(2)]
    betas = [
        plgpu.load(beta_ref.at[b, token, h], mask=is_token, other=0).astype(jnp.float32) for token, is_token in tokens
    ]
    T1, T2 = (invert_unit_lower(beta[:, None] * _quarter(kk, i, i), solve) for i, beta in enumerate(betas))
    between = -solve(T2, solve(betas[1][:, None] * _quarter(kk, 1, 0), T1))
    for row, column, quarter in ((0, 0, T1), (1, 1, T2), (1, 0, between), (0, 1, jnp.zeros_like(T1))):
        at = pl.ds(row * HALF, HALF), pl.ds(column * HALF, HALF)
        T_ref[at] = (quarter * betas[column][None, :]).astype(T_ref.dtype)


def _quarter(whole: Array, row: int, column: int) -> Array:
    """Returns a quarter of a matrix [64, 64], whose values Triton cannot slice."""
    half = jnp.arange(2, dtype=jnp.int32)
    rows = jnp.sum(jnp.where(half[:, None, None] == row, whole.reshape(2, HALF, CHUNK), 0), axis=0)
    return jnp.sum(jnp.where(half[None, :, None] == column, rows.reshape(HALF, 2, HALF), 0), axis=1)


def _tokens(order_ref: Any, first: Array, count: Array, b: Array, start: int, many: int) -> tuple[Array, Array]:
    """Returns some of a chunk's tokens, and which of them it has."""
    number = start + jnp.arange(many, dtype=jnp.int32)
    is_token = number < count
    return plgpu.load(order_ref.at[b, jnp.where(is_token, first + number, 0)], mask=is_token, other=0), is_token


def take_columns(ref: Any, b: Array, token: Array, h: Array, column: Array, is_token: Array) -> Array:
    """Reads columns of tokens of a head as float32, zeros where there is no token."""
    at = ref.at[b, token[:, None], h, column[None, :]]
    mask = jnp.broadcast_to(is_token[:, None], (token.shape[0], column.shape[0]))
    return plgpu.load(at, mask=mask, other=0).astype(jnp.float32)


class Scores(NamedTuple):
    """Products under decay [64, 64], and the log decay from the chunk's first token and to its last, [64, C]."""

    qk: Array
    kk: Array
    prefix: Array
    suffix: Array


def decayed_products(
    q: Float[Array, "64 C"],
    k: Float[Array, "64 C"],
    g: Float[Array, "64 C"],
    dot: Callable[[Array, Array], Array],
) -> Scores:
    """Returns q_i . exp(g_{j+1} + ... + g_i) k_j for j <= i, and the same of k_i for j < i, zeros elsewhere."""
    width, number = q.shape[1], jnp.arange(CHUNK, dtype=jnp.int32)
    row, column = number[:, None], number[None, :]
    qk = jnp.where(row == column, jnp.sum(q * k, axis=1)[:, None], 0)
    kk = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    prefix, suffix, size = g, jnp.zeros_like(g), 1
    while size < CHUNK:
        is_second = row // size % 2 == 1
        later = jnp.where(is_second, jnp.exp(prefix), 0)
        earlier = jnp.where(is_second, 0, jnp.exp(suffix) * k).T
        across = row // (2 * size) == column // (2 * size)
        qk += jnp.where(across, dot(later * q, earlier), 0)
        kk += jnp.where(across, dot(later * k, earlier), 0)
        halves = jnp.sum(g.reshape(CHUNK // (2 * size), 2, size, width), axis=2)
        half = jnp.arange(2, dtype=jnp.int32)[None, :, None]

        def other_half(which: int, halves: Array = halves, half: Array = half, size: int = size) -> Array:
            total = jnp.sum(jnp.where(half == which, halves, 0), axis=1)[:, None, :]
            return jnp.broadcast_to(total, (CHUNK // (2 * size), 2 * size, width)).reshape(CHUNK, width)

        prefix += jnp.where(is_second, other_half(0), 0)
        suffix += jnp.where(is_second, 0, other_half(1))
        size *= 2
    return Scores(qk, kk, prefix, suffix)


def invert_unit_lower(A: Float[Array, "32 32"], dot: Callable[[Array, Array], Array]) -> Float[Array, "32 32"]:
    """Returns (I + A)^-1 of a strictly lower triangular A."""
    number = jnp.arange(HALF, dtype=jnp.int32)
    row, column = number[:, None], number[None, :]
    eye = (row == column).astype(jnp.float32)
    L = jnp.where(row // LEAST == column // LEAST, A, 0)
    square = dot(L, L)
    T = dot(dot(eye - L, eye + square), eye + dot(square, square))
    size = LEAST
    while size < HALF:
        between = (row // size == column // size + 1) & (row // size % 2 == 1)
        T -= dot(T, dot(jnp.where(between, A, 0), T))
        size *= 2
    return T


def chunk_parts(
    tokens: tuple[Array, ...],
    order: Array,
    first: Array,
    count: Array,
    *,
    normalize_qk: bool,
    scale: float,
    interpret: bool,
) -> tuple[Array, ...]:
    """Returns T diag(beta), Aqk, and k, q, k and decay as the state meets them, [B, chunks, H, ...], in q's dtype,
    decays in float32.

    Chunk c of a row has the `count` tokens order[first], order[first + 1], ...; `tokens` are q, k, g and beta.
    """
    q = tokens[0]
    (batch, _, heads, keys), chunks = q.shape, first.shape[1]
    square, key = (CHUNK, CHUNK), (CHUNK, keys)
    shapes = (square, square, key, key, key, (keys,))

    def part(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda h, c, b: (b, c, h, *(0 for _ in shape)))

    return pl.pallas_call(
        partial(_chunk, normalize_qk=normalize_qk, scale=scale, interpret=interpret),
        grid=(heads, chunks, batch),
        out_specs=[part(shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct((batch, chunks, heads, *shape), q.dtype if len(shape) > 1 else jnp.float32)
            for shape in shapes
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        name="kda_chunk",
        interpret=interpret,
    )(order, first, count, *tokens)
