"""The choice of experts in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def route(
    x: Float[Array, "T D"],
    weight: Float[Array, "E D"],
    bias: Float32[Array, "E"],
    *,
    choices: int,
    groups: int,
    kept_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Int32[Array, "T J"], Float32[Array, "T J"]]:
    """See `api.route`."""
    wide, highest = (array.astype(jnp.float32) for array in (x, weight)), jax.lax.Precision.HIGHEST
    scores = jax.nn.sigmoid(jnp.einsum("td,ed->te", *wide, precision=highest))
    _, chosen = jax.lax.top_k(_eligible(scores + bias, groups, kept_groups), choices)
    # (jnp.take_along_axis would gather number by number)
    is_chosen = chosen[:, :, None] == jnp.arange(weight.shape[0])
    weights = jnp.sum(jnp.where(is_chosen, scores[:, None], 0), axis=-1)
    if normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * scale


def _eligible(choice: Float32[Array, "T E"], groups: int, kept_groups: int) -> Float32[Array, "T E"]:
    """Sets scores to -inf outside the `kept_groups` groups whose two best experts sum highest."""
    if groups == 1:
        return choice
    grouped = choice.reshape(-1, groups, choice.shape[1] // groups)
    best_two, _ = jax.lax.top_k(grouped, 2)
    _, kept = jax.lax.top_k(best_two.sum(-1), kept_groups)
    mask = jax.nn.one_hot(kept, groups, dtype=bool).any(axis=1)
    return jnp.where(mask[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
