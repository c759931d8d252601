"""Attention over keys that come block by block: the online softmax (arXiv 1805.02867, arXiv 2205.14135)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Running(NamedTuple):
    """What has been attended to so far; all float32."""

    top: Float[Array, "*rows"]  # largest score
    total: Float[Array, "*rows"]  # sum of exp(score - top)
    out: Float[Array, "*rows D"]  # sum of exp(score - top) value


def nothing(rows: tuple[int, ...], width: int) -> Running:
    """Before the first block."""
    return Running(
        jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, width), jnp.float32)
    )


def attend(running: Running, scores: Float[Array, "*rows T"], values: Array, weigh: str) -> Running:
    """Adds a block: float32 `scores`, -inf where nothing is to be seen; `weigh` is the einsum of weights and values."""
    # The result does not depend on `top`, so no gradient need go through it.
    top = lax.stop_gradient(jnp.maximum(running.top, jnp.max(scores, axis=-1)))
    finite = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(scores - finite[..., None])
    keep = jnp.exp(running.top - finite)
    seen = jnp.einsum(
        weigh, weights.astype(values.dtype), values, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return Running(top, keep * running.total + jnp.sum(weights, axis=-1), keep[..., None] * running.out + seen)


def finish(running: Running) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """The attention's output, and the log-sum-exp of the scores; zeros and -inf for a row that saw nothing."""
    empty = running.total == 0
    total = jnp.where(empty, 1, running.total)
    lse = jnp.where(empty, -jnp.inf, jnp.where(empty, 0, running.top) + jnp.log(total))
    return running.out / total[..., None], lse
