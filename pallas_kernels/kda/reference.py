"""Kimi Delta Attention as the plain recurrence, one token after another, in the precision of its arguments.

arXiv 2510.26692, section 3: per head, with the state S in R^{Dk x Dv},
    S <- diag(exp(g)) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kda(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T H Dk"],
    v: Float[Array, "B T H Dv"],
    g: Float[Array, "B T H Dk"],
    beta: Float[Array, "B T H"],
    initial_state: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dk Dv"]]:
    """Returns outputs and final state, without packing, norm or scale; float64 under `jax.enable_x64`."""

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g, beta = token
        o, state = kda_step(q, k, v, g, beta, state)
        return state, o

    tokens = tuple(jnp.moveaxis(array, 1, 0) for array in (q, k, v, g, beta))
    state, o = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(o, 0, 1), state


def kda_step(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    g: Float[Array, "B H Dk"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B H Dv"], Float[Array, "B H Dk Dv"]]:
    """Returns one token's output and the state after it."""
    decayed = jnp.exp(g)[..., None] * state
    error = v - jnp.einsum("bhkv,bhk->bhv", decayed, k, precision=jax.lax.Precision.HIGHEST)
    state = decayed + beta[..., None, None] * k[..., :, None] * error[..., None, :]
    return jnp.einsum("bhkv,bhk->bhv", state, q, precision=jax.lax.Precision.HIGHEST), state
