"""The part of KDA that needs no state, as two Pallas kernels for NVIDIA GPUs: each chunk's scores, and U and W.

With the words of `kda.xla`: U, W and Aqk of a chunk of 64 tokens and one head, and q, k and the chunk's whole decay as
the state meets them. Products under decay split the chunk as `kda.decays` does, so that nothing overflows and nothing
cancels; each level is one product of the whole chunk. (I + A) is inverted in blocks of 8 by products of powers, since
the eighth power of a block is zero, and pairs of blocks are merged: T <- T - T F T with F the part of A between them.
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

from pallas_kernels.kda.triton_step import normalized

CHUNK, LEAST = 64, 8


def make_dot(interpret: bool) -> Callable[..., Array]:
    """Returns a function that multiplies matrices of numbers rounded to a dtype, and sums in float32.

    Products of float32 are three of 11 bits each on the matrix units of a GPU, which are exact to 2^-21 or so; a CPU
    has products of float32.
    """
    of_float32 = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def dot(a: Array, b: Array, dtype: Any) -> Array:
        precision = of_float32 if dtype == jnp.float32 else lax.Precision.DEFAULT
        return jnp.dot(a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)

    return dot


def _score(
    order_ref: Any,
    first_ref: Any,
    count_ref: Any,
    q_ref: Any,
    k_ref: Any,
    g_ref: Any,
    beta_ref: Any,
    A_ref: Any,
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
    token, is_token = _tokens(order_ref, first_ref[b, c], count_ref[b, c], b)
    q, k, g = (_take(ref, b, token, h, is_token) for ref in (q_ref, k_ref, g_ref))
    if normalize_qk:
        q, k = normalized(q), normalized(k)
    q = scale * q
    beta = plgpu.load(beta_ref.at[b, token, h], mask=is_token, other=0).astype(jnp.float32)[:, None]
    scores = decayed_products(q, k, g, partial(make_dot(interpret), dtype=q_ref.dtype))
    A_ref[...] = beta * scores.kk
    Aqk_ref[...] = scores.qk.astype(Aqk_ref.dtype)
    since = jnp.exp(scores.prefix)
    since_ref[...] = (beta * since * k).astype(since_ref.dtype)
    read_ref[...] = (since * q).astype(read_ref.dtype)
    written_ref[...] = (jnp.exp(scores.suffix) * k).astype(written_ref.dtype)
    total_ref[...] = jnp.exp(jnp.sum(g, axis=0))


def _solve(
    order_ref: Any,
    first_ref: Any,
    count_ref: Any,
    v_ref: Any,
    beta_ref: Any,
    A_ref: Any,
    since_ref: Any,
    U_ref: Any,
    W_ref: Any,
    *,
    interpret: bool,
) -> None:
    h, c, b = (pl.program_id(axis) for axis in range(3))
    dot = make_dot(interpret)
    token, is_token = _tokens(order_ref, first_ref[b, c], count_ref[b, c], b)
    beta = plgpu.load(beta_ref.at[b, token, h], mask=is_token, other=0).astype(jnp.float32)[:, None]
    T = invert_unit_lower(A_ref[...], partial(dot, dtype=jnp.float32))
    W_ref[...] = dot(T, since_ref[...], W_ref.dtype).astype(W_ref.dtype)
    U_ref[...] = dot(T, beta * _take(v_ref, b, token, h, is_token), U_ref.dtype).astype(U_ref.dtype)


def _tokens(order_ref: Any, first: Array, count: Array, b: Array) -> tuple[Array, Array]:
    number = jnp.arange(CHUNK, dtype=jnp.int32)
    is_token = number < count
    return plgpu.load(order_ref.at[b, jnp.where(is_token, first + number, 0)], mask=is_token, other=0), is_token


def _take(ref: Any, b: Array, token: Array, h: Array, is_token: Array) -> Array:
    channel = jnp.arange(ref.shape[3], dtype=jnp.int32)
    at = ref.at[b, token[:, None], h, channel[None, :]]
    return plgpu.load(at, mask=is_token[:, None], other=0).astype(jnp.float32)


class Scores(NamedTuple):
    """Products under decay [64, 64], and the log decay from the chunk's first token and to its last, [64, Dk]."""

    qk: Array
    kk: Array
    prefix: Array
    suffix: Array


def decayed_products(
    q: Float[Array, "64 Dk"],
    k: Float[Array, "64 Dk"],
    g: Float[Array, "64 Dk"],
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


def invert_unit_lower(A: Float[Array, "64 64"], dot: Callable[[Array, Array], Array]) -> Float[Array, "64 64"]:
    """Returns (I + A)^-1 of a strictly lower triangular A."""
    number = jnp.arange(CHUNK, dtype=jnp.int32)
    row, column = number[:, None], number[None, :]
    eye = (row == column).astype(jnp.float32)
    L = jnp.where(row // LEAST == column // LEAST, A, 0)
    square = dot(L, L)
    T = dot(dot(eye - L, eye + square), eye + dot(square, square))
    size = LEAST
    while size < CHUNK:
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
    """Returns U, W, Aqk, and q, k and decay as the state meets them, [B, chunks, H, ...], in q's dtype, decays in
    float32.

    Chunk c of a row has the `count` tokens order[first], order[first + 1], ...; `tokens` are q, k, v, g and beta.
    """
    q, k, v, g, beta = tokens
    (batch, _, heads, keys), values, chunks = q.shape, v.shape[3], first.shape[1]
    square, key, value = (CHUNK, CHUNK), (CHUNK, keys), (CHUNK, values)

    def part(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda h, c, b: (b, c, h, *(0 for _ in shape)))

    def array(shape: tuple[int, ...], dtype: Any = q.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, chunks, heads, *shape), dtype)

    chunk = (order, first, count)
    A, Aqk, since, read, written, total = pl.pallas_call(
        partial(_score, normalize_qk=normalize_qk, scale=scale, interpret=interpret),
        grid=(heads, chunks, batch),
        out_specs=[part(shape) for shape in (square, square, key, key, key, (keys,))],
        out_shape=[
            array(square, jnp.float32),
            array(square),
            array(key),
            array(key),
            array(key),
            array((keys,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        name="kda_score",
        interpret=interpret,
    )(*chunk, q, k, g, beta)
    U, W = pl.pallas_call(
        partial(_solve, interpret=interpret),
        grid=(heads, chunks, batch),
        in_specs=[pl.no_block_spec] * 5 + [part(square), part(key)],
        out_specs=[part(value), part(key)],
        out_shape=[array(value), array(key)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="kda_solve",
        interpret=interpret,
    )(*chunk, v, beta, A, since)
    return U, W, Aqk, read, written, total
