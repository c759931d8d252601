"""Kimi Delta Attention in plain JAX: the recurrence, and the chunkwise form.

The chunkwise form (arXiv 2510.26692, section 3 and appendix; the WY representation of arXiv 2406.06484): with G the
running log decay of a chunk, S its incoming state,
    A_ij = beta_i k_i . (exp(G_i - G_j) k_j), j < i;   [U | W] = (I + A)^-1 beta [V | exp(G) K];   V' = U - W S
    O = (exp(G) Q) S + Aqk V',  Aqk_ij = q_i . (exp(G_i - G_j) k_j), j <= i;   S <- exp(G_C) S + (exp(G_C - G) K)^T V'.
Everything that needs no state is done for a group of chunks at once; `jax.checkpoint` around a group makes the backward
pass recompute it from the group's state, so that training keeps the inputs and one state per group. All arithmetic is
float32 (or wider).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.kda.decays import decayed_products
from pallas_kernels.kda.packing import chunk_layout
from pallas_kernels.kda.triangular import unit_lower_inverse

CHUNK = 64
# Chunks times heads whose intermediate results exist at one time.
GROUP = 64

Result = tuple[Float[Array, "B T H Dv"], Float[Array, "B N H Dk Dv"]]


def recurrent(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    states: Float[Array, "B N H Dk Dv"],
    segment_ids: Int[Array, "B T"] | None,
) -> Result:
    """Token by token; the state of segment n is states[:, n]. Padding (segment -1) must hold zeros.

    Without segment_ids all tokens belong to segment 0, the only one.
    """
    if segment_ids is None:
        segment_ids = jnp.zeros(beta.shape[:2], jnp.int32)

    def step(states: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, beta, segment = token
        state = _take_state(states, segment)
        o, new = kda_step(q, k, v, g, beta, state)
        new = jnp.where((segment >= 0)[:, None, None, None], new, state)
        return _put_state(states, segment, new), o

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
) -> Result:
    """Chunk by chunk, each segment beginning a chunk of its own; arguments and results as `recurrent`."""
    batch, tokens, heads, _ = q.shape
    layout = None if segment_ids is None else chunk_layout(segment_ids, states.shape[1], CHUNK)
    chunks = -(-tokens // CHUNK) if layout is None else layout.segments.shape[1]
    groups = -(-chunks // max(1, GROUP // (batch * heads)))
    size = -(-chunks // groups)

    def arrange(array: Array) -> Array:
        placed = array if layout is None else layout.place(array)
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, groups * size * CHUNK - placed.shape[1])
        return rearrange(jnp.pad(placed, padding), "b (n m c) h ... -> n m b h c ...", n=groups, c=CHUNK)

    # A chunk without tokens leaves whatever state it is given as it is.
    segments = jnp.zeros((batch, chunks), jnp.int32) if layout is None else layout.segments
    segments = jnp.pad(segments, ((0, 0), (0, groups * size - chunks)))
    inputs = (*(arrange(array) for array in (q, k, v, g, beta)), rearrange(segments, "b (n m) -> n m b", n=groups))
    states, o = lax.scan(jax.checkpoint(_group), states, inputs)
    o = rearrange(o, "n m b h c d -> b (n m c) h d")
    return o[:, :tokens] if layout is None else layout.collect(o), states


def kda_step(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    g: Float[Array, "B H Dk"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B H Dv"], Float[Array, "B H Dk Dv"]]:
    """One token; everything in the state's dtype.

    The decayed state is read once, for k and for q, before it is written: with u = beta (v - S^T k) the new state gives
    q the output S^T q + (k . q) u.
    """
    decayed = jnp.exp(g)[..., None] * state
    read = _einsum("bhkv,sbhk->sbhv", decayed, jnp.stack([k, q]))
    update = beta[..., None] * (v - read[0])
    o = read[1] + jnp.sum(k * q, axis=-1, keepdims=True) * update
    return o, decayed + k[..., :, None] * update[..., None, :]


def _group(states: Float[Array, "B N H Dk Dv"], inputs: tuple[Array, ...]) -> tuple[Array, Float[Array, "M B H C Dv"]]:
    *tokens, segments = inputs
    steps, batch, heads = tokens[0].shape[:3]
    # One leading axis for all chunks: with several of equal sizes, XLA's CPU compiler has failed on such products.
    q, k, v, g, beta = (rearrange(array, "m b h ... -> (m b h) ...") for array in tokens)
    (qk, kk), decays = decayed_products(jnp.stack([q, k]), k, g)
    since, until, total = (jnp.exp(array[:, 0]) for array in decays)
    inverse = unit_lower_inverse(beta[..., None] * kk)
    solved = _einsum("nij,njd->nid", inverse, beta[..., None] * jnp.concatenate([v, since * k], axis=-1))
    U, W = jnp.split(solved, [v.shape[-1]], axis=-1)

    def chunk(states: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
        segment, U, W, qk, read, written, total = parts
        S = _take_state(states, segment)
        seen = _einsum("bhck,bhkv->bhcv", jnp.concatenate([W, read], axis=-2), S)
        pseudo = U - seen[..., :CHUNK, :]
        o = seen[..., CHUNK:, :] + _einsum("bhcj,bhjv->bhcv", qk, pseudo)
        S = jnp.swapaxes(total, -1, -2) * S + _einsum("bhck,bhcv->bhkv", written, pseudo)
        return _put_state(states, segment, S), o

    parts = tuple(
        rearrange(array, "(m b h) ... -> m b h ...", m=steps, b=batch, h=heads)
        for array in (U, W, qk, since * q, until * k, total)
    )
    return lax.scan(chunk, states, (segments, *parts))


def _take_state(states: Float[Array, "B N H Dk Dv"], segment: Int[Array, "B"]) -> Float[Array, "B H Dk Dv"]:
    if states.shape[1] == 1:
        return states[:, 0]
    return jax.vmap(lambda rows, index: rows[jnp.maximum(index, 0)])(states, segment)


def _put_state(
    states: Float[Array, "B N H Dk Dv"], segment: Int[Array, "B"], state: Float[Array, "B H Dk Dv"]
) -> Float[Array, "B N H Dk Dv"]:
    if states.shape[1] == 1:
        return state[:, None]
    return jax.vmap(lambda rows, index, new: rows.at[jnp.maximum(index, 0)].set(new))(states, segment, state)


def _einsum(form: str, *operands: Array) -> Array:
    return jnp.einsum(form, *operands, precision=lax.Precision.HIGHEST)
