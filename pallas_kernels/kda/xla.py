"""Kimi Delta Attention in plain JAX: the recurrence, and the chunkwise form.

The chunkwise form (arXiv 2510.26692, section 3 and appendix; the WY representation of arXiv 2406.06484): with G the
running log decay of a chunk, S its incoming state,
    A_ij = beta_i k_i . (exp(G_i - G_j) k_j), j < i;   [U | W] = (I + A)^-1 beta [V | exp(G) K];   V' = U - W S
    O = (exp(G) Q) S + Aqk V',  Aqk_ij = q_i . (exp(G_i - G_j) k_j), j <= i;   S <- exp(G_C) S + (exp(G_C - G) K)^T V'.
Where segments share a chunk, pairs of tokens of two segments contribute 0, S is read by the segment that the chunk
continues and written by its last. Everything that needs no state is computed for a group of chunks at once; groups
follow one another in a scan, so that intermediate results, which are wider or longer than the tokens, exist for one
group at a time. All arithmetic is float32 (or wider).
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.kda.chunk_groups import CHUNK, ChunkGroups
from pallas_kernels.kda.decays import decayed_products
from pallas_kernels.kda.triangular import unit_lower_inverse

Tokens = tuple[Array, ...]  # q, k, v, g and beta
Result = tuple[Float[Array, "B T H Dv"], Float[Array, "B N H Dk Dv"]]


def recurrent(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    states: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    normalize_qk: bool = False,
    scale: float = 1.0,
) -> Result:
    """Computes token by token; the state of segment n is states[:, n], whose dtype is that of the arithmetic.

    Without segment_ids all tokens belong to segment 0, the only one.
    """
    dtype = v.dtype
    if segment_ids is None:
        segment_ids = jnp.zeros(beta.shape[:2], jnp.int32)
    q, k, v, g, beta = _prepare((q, k, v, g, beta), states.dtype, normalize_qk, scale)

    def step(states: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, beta, segment = token
        state = take_state(states, segment)
        o, new = kda_step(q, k, v, g, beta, state)
        is_token = (segment >= 0)[:, None, None]
        new = jnp.where(is_token[..., None], new, state)
        return put_state(states, segment, new), jnp.where(is_token, o, 0).astype(dtype)

    tokens = tuple(jnp.moveaxis(array, 1, 0) for array in (q, k, v, g, beta, segment_ids))
    states, o = lax.scan(step, states, tokens)
    return jnp.moveaxis(o, 0, 1), states


def chunked(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    states: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    normalize_qk: bool = False,
    scale: float = 1.0,
    chunk_states: bool = False,
    outputs_only: bool = False,
) -> tuple[Array, ...]:
    """Computes chunk by chunk, with a new chunk for each segment; arguments and results are those of `recurrent`.

    With `chunk_states` it also returns the state before each chunk, [B, ceil(T / CHUNK) + N - 1, H, Dk, Dv].
    With `outputs_only` the states given are zeros and those returned are, too. Segments then share chunks, and the time
    does not depend on N.
    """
    groups = ChunkGroups.make(beta, states, segment_ids, outputs_only)

    def step(states: Array, group: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
        states, *results = advance_group(
            states, *group, normalize_qk=normalize_qk, scale=scale, chunk_states=chunk_states
        )
        return states, tuple(results)

    tokens = tuple(groups.split(array) for array in (q, k, v, g, beta))
    after, (o, *saved) = lax.scan(step, groups.carried(states), (tokens, groups.segments, groups.owners))
    room = -(-groups.tokens // CHUNK) + states.shape[1] - 1
    return groups.join(o), states if outputs_only else after, *(groups.join_states(array, room) for array in saved)


def kda_step(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    g: Float[Array, "B H Dk"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H Dk Dv"],
    *,
    normalize_qk: bool = False,
    scale: float = 1.0,
) -> tuple[Float[Array, "B H Dv"], Float[Array, "B H Dk Dv"]]:
    """Computes one token, in the state's dtype.

    The decayed state is read once, for k and for q, before it is written: with u = beta (v - S^T k) the new state gives
    q the output S^T q + (k . q) u.
    """
    q, k, values, g, beta = _prepare((q, k, v, g, beta), state.dtype, normalize_qk, scale)
    decayed = jnp.exp(g)[..., None] * state
    read = _einsum("bhkv,sbhk->sbhv", decayed, jnp.stack([k, q]))
    update = beta[..., None] * (values - read[0])
    o = read[1] + jnp.sum(k * q, axis=-1, keepdims=True) * update
    return o.astype(v.dtype), decayed + k[..., :, None] * update[..., None, :]


def advance_group(
    states: Float[Array, "B N H Dk Dv"],
    tokens: Tokens,
    segments: Int[Array, "chunks B"],
    owners: Int[Array, "B t"] | None,
    *,
    normalize_qk: bool,
    scale: float,
    chunk_states: bool = False,
) -> tuple[Array, ...]:
    """Returns the states after a group's chunks, [B, N, H, Dk, Dv], and its outputs, [B, t, H, Dv]; tokens [B, t, H,
    ...], segments and owners are those of `ChunkGroups`.

    With `chunk_states` it also returns the state before each chunk, [chunks, B, H, Dk, Dv].
    """
    steps, (batch, _, heads, _) = segments.shape[0], tokens[0].shape
    # One leading axis for all chunks: with several of equal sizes, XLA's CPU compiler has failed on such products.
    arranged = tuple(rearrange(array, "b (m c) h ... -> (m b h) c ...", m=steps) for array in tokens)
    q, k, v, g, beta = _prepare(arranged, states.dtype, normalize_qk, scale)
    (qk, kk), decays = decayed_products(jnp.stack([q, k]), k, g)
    since, until, total = (jnp.exp(array[:, 0]) for array in decays)
    if owners is not None:
        owner = repeat(owners, "b (m c) -> (m b h) c", m=steps, h=heads)
        last = owner[:, -1:]
        qk, kk = (jnp.where(owner[:, :, None] == owner[:, None, :], products, 0) for products in (qk, kk))
        since, until, total = (
            jnp.where(reaches[:, :, None], decay, 0)
            for reaches, decay in ((owner == 0, since), (owner == last, until), (last == 0, total))
        )
    inverse = unit_lower_inverse(beta[..., None] * kk)
    solved = _einsum("nij,njd->nid", inverse, beta[..., None] * jnp.concatenate([v, since * k], axis=-1))
    U, W = jnp.split(solved, [v.shape[-1]], axis=-1)

    def chunk(states: Array, parts: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        segment, U, W, qk, read, written, total = parts
        S = take_state(states, segment)
        saved = (S,) if chunk_states else ()
        seen = _einsum("bhck,bhkv->bhcv", jnp.concatenate([W, read], axis=-2), S)
        pseudo = U - seen[..., :CHUNK, :]
        o = seen[..., CHUNK:, :] + _einsum("bhcj,bhjv->bhcv", qk, pseudo)
        S = jnp.swapaxes(total, -1, -2) * S + _einsum("bhck,bhcv->bhkv", written, pseudo)
        return put_state(states, segment, S), (o.astype(tokens[2].dtype), *saved)

    parts = tuple(
        rearrange(array, "(m b h) ... -> m b h ...", m=steps, b=batch, h=heads)
        for array in (U, W, qk, since * q, until * k, total)
    )
    states, (o, *saved) = lax.scan(chunk, states, (segments, *parts))
    return states, rearrange(o, "m b h c v -> b (m c) h v"), *saved


def _prepare(tokens: Tokens, dtype: jnp.dtype, normalize_qk: bool, scale: float) -> Tokens:
    q, k, v, g, beta = (array.astype(dtype) for array in tokens)
    if normalize_qk:
        q, k = (array * lax.rsqrt(jnp.sum(array**2, axis=-1, keepdims=True) + 1e-6) for array in (q, k))
    return scale * q, k, v, g, beta


def take_state(states: Float[Array, "B N H Dk Dv"], segment: Int[Array, "B"]) -> Float[Array, "B H Dk Dv"]:
    """Returns the state of each row's `segment`; for padding, the state of any segment."""
    if states.shape[1] == 1:
        return states[:, 0]
    return jax.vmap(lambda rows, index: rows[jnp.maximum(index, 0)])(states, segment)


def put_state(
    states: Float[Array, "B N H Dk Dv"], segment: Int[Array, "B"], state: Float[Array, "B H Dk Dv"]
) -> Float[Array, "B N H Dk Dv"]:
    """Returns `states` with the state of each row's `segment` replaced."""
    if states.shape[1] == 1:
        return state[:, None]
    return jax.vmap(lambda rows, index, new: rows.at[jnp.maximum(index, 0)].set(new))(states, segment, state)


def _einsum(form: str, *operands: Array) -> Array:
    return jnp.einsum(form, *operands, precision=lax.Precision.HIGHEST)
