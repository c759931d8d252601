"""Merging of attentions over different keys by the log-sum-exp of their scores (arXiv 2205.14135, section 3.1)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

Partial = tuple[Float[Array, "*rows Dv"], Float32[Array, "*rows"]]


def merge_partials(first: Partial, second: Partial) -> Partial:
    """Merges two attentions over different keys into the attention over all keys.

    Each is an output [..., Dv] (of equal shapes and dtypes) and its lse float32 [...], as `mla_prefill` and
    `mla_decode` return them with `return_lse`. An lse of -inf says that a row attended to no key; where both are -inf,
    the output is zeros.
    """
    (a, a_lse), (b, b_lse) = first, second
    top = jnp.maximum(a_lse, b_lse)
    finite = jnp.where(jnp.isneginf(top), 0, top)
    a_weight, b_weight = jnp.exp(a_lse - finite), jnp.exp(b_lse - finite)
    total = a_weight + b_weight
    share = jnp.where(total == 0, 1, total)
    out = (a_weight / share)[..., None] * a + (b_weight / share)[..., None] * b
    return out.astype(a.dtype), jnp.where(total == 0, -jnp.inf, finite + jnp.log(share))


def pack_partials(
    out: Float32[Array, "B H L"], lse: Float32[Array, "B H"], shards: int
) -> Float32[Array, "S B heads_of_S packed"]:
    """Packs float32 outputs and their log-sum-exps as `mla_decode` does for so many `shards`."""
    packed = jnp.concatenate([out, lse[..., None]], axis=-1)
    return jnp.moveaxis(packed.reshape(len(packed), shards, -1, packed.shape[-1]), 1, 0)
