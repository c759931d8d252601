"""Attention over keys block by block: the online softmax (arXiv 1805.02867, arXiv 2205.14135)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class RunningSoftmax(NamedTuple):
    """Running sums over the keys so far; all are float32."""

    top: Float[Array, "*rows"]  # largest score
    total: Float[Array, "*rows"]  # sum of exp(score - top)
    out: Float[Array, "*rows D"]  # sum of exp(score - top) value


def empty(rows: tuple[int, ...], width: int) -> RunningSoftmax:
    """Returns the sums over no keys."""
    return RunningSoftmax(
        jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows, width), jnp.float32)
    )


def attend(running: RunningSoftmax, scores: Float[Array, "*rows T"], values: Array, weigh: str) -> RunningSoftmax:
    """Adds a block of float32 `scores`, -inf for hidden keys; `weigh` is the einsum of weights and values."""
    # The result does not depend on `top`, so no gradient need go through it.
    top = lax.stop_gradient(jnp.maximum(running.top, jnp.max(scores, axis=-1)))
    finite = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(scores - finite[..., None])
    keep = jnp.exp(running.top - finite)
    seen = jnp.einsum(
        weigh, weights.astype(values.dtype), values, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return RunningSoftmax(top, keep * running.total + jnp.sum(weights, axis=-1), keep[..., None] * running.out + seen)


def finish(running: RunningSoftmax) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Returns the attention's output and the log-sum-exp of the scores; zeros and -inf for a row without keys."""
    is_empty = running.total == 0
    total = jnp.where(is_empty, 1, running.total)
    lse = jnp.where(is_empty, -jnp.inf, jnp.where(is_empty, 0, running.top) + jnp.log(total))
    return running.out / total[..., None], lse
