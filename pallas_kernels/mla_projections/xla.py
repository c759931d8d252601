"""The projections around `mla_decode` in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.norm import rms_norm

Rotation = tuple[Float32[Array, "..."], Float32[Array, "..."]]


def rotate_pairs(x: Float[Array, "... R"], cos: Float32[Array, "..."], sin: Float32[Array, "..."]) -> Array:
    """Rotates interleaved pairs of x and returns [first members | second members], in x's dtype.

    `cos` and `sin` are those of the pairs' R/2 angles, each twice.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.concatenate([first, second], -1) * cos + jnp.concatenate([-second, first], -1) * sin
    return rotated.astype(x.dtype)


def mla_query(
    q_a: Float[Array, "B C"] | None,
    kv_a: Float[Array, "S B columns"],
    rotation: Rotation | None,
    q_norm: Float[Array, "C"] | None,
    kv_norm: Float[Array, "L"],
    q_b: Float[Array, "heads_key C"],
    kv_b: Float[Array, "heads_keyvalue L"],
    *,
    heads: int,
    eps: float,
) -> tuple[Float[Array, "B H width"], Float[Array, "B width"]]:
    """See `api.mla_query`."""
    latent = kv_norm.shape[0]
    if q_a is None:
        q_a, kv = map(_whole, jnp.split(kv_a, [q_b.shape[1] // len(kv_a)], axis=-1))
    else:
        kv = _whole(kv_a)
    rope = kv.shape[1] - latent
    low = q_a if q_norm is None else rms_norm(q_a, q_norm, eps)
    q = _product("bc,oc->bo", low, q_b).reshape(q_a.shape[0], heads, -1)
    nope, pe = jnp.split(q, [q.shape[-1] - rope], axis=-1)
    c, k_pe = jnp.split(kv, [latent], axis=-1)
    if rotation is not None:
        cos, sin = rotation
        pe, k_pe = rotate_pairs(pe, cos[:, None], sin[:, None]), rotate_pairs(k_pe, cos, sin)
    w_uk = kv_b.reshape(heads, -1, latent)[:, : nope.shape[-1]]
    # (The other way round, XLA on CPU has no product of bf16.)
    q_latent = _product("hnc,bhn->bhc", w_uk, nope)
    return jnp.concatenate([q_latent, pe], axis=-1), jnp.concatenate([rms_norm(c, kv_norm, eps), k_pe], axis=-1)


def mla_output(
    o: Float[Array, "B H L"] | Float32[Array, "S B H packed"],
    kv_b: Float[Array, "heads_keyvalue L"],
    o_proj: Float[Array, "D heads_value"],
    gate: Float[Array, "B heads_value"] | None = None,
) -> Float32[Array, "B D"]:
    """See `api.mla_output`."""
    if o.ndim == 4:
        o = merge_packed(o).astype(kv_b.dtype)
    batch, heads, latent = o.shape
    w_uv = kv_b.reshape(heads, -1, latent)[:, -(o_proj.shape[1] // heads) :]
    wide = jnp.einsum("bhc,hvc->bhv", o, w_uv, preferred_element_type=jnp.float32).reshape(batch, -1)
    if gate is not None:
        wide = wide * jax.nn.sigmoid(gate.astype(jnp.float32))
    values = wide.astype(o.dtype)
    return jnp.einsum("bv,dv->bd", values, o_proj, preferred_element_type=jnp.float32)


def merge_packed(packed: Float32[Array, "S *rows packed"]) -> Float32[Array, "*rows L"]:
    """Merges attentions over S caches, [..., L + 1] with the log-sum-exp last, into the attention over all of them
    (arXiv 2205.14135, section 3.1); zeros where none has any key."""
    outs, lses = packed[..., :-1], packed[..., -1:]
    top = jnp.max(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(top), 0, top))
    total = jnp.sum(weights, axis=0)
    return jnp.sum(weights * outs, axis=0) / jnp.where(total == 0, 1, total)


def _whole(shards: Float[Array, "S B columns"]) -> Float[Array, "B all"]:
    """Joins the columns that S devices have."""
    return shards[0] if len(shards) == 1 else jnp.moveaxis(shards, 0, 1).reshape(shards.shape[1], -1)


def _product(terms: str, a: Array, b: Array) -> Array:
    return jnp.einsum(terms, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
