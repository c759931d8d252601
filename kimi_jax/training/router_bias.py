"""Balance of experts without a loss: the router's correction bias follows the load (DeepSeek-V3, arXiv 2412.19437,
section 2.1.2; how Kimi updates it is not published)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from kimi_jax.training.leaves import ROUTER_BIAS, map_leaves, named_leaves


def update_router_bias(
    params: Any, expert_counts: Int32[Array, "layers experts"], rate: float | jax.Array = 1e-3
) -> Any:
    """Returns the parameters with every `e_score_correction_bias` moved by `rate` against its layer's load.

    bias[e] += rate * sign(mean(count) - count[e]), after the optimizer's step.

    Args:
      params: a model's parameters, or a part of them with all correction biases.
      expert_counts: the tokens of the global batch that chose each expert, for each layer with experts in order
        (`Statistics.expert_counts`); padding is not counted.
      rate: gamma; 0 in the last few per cent of training.

    Raises:
      ValueError: there are not as many biases as layers of counts.
    """
    names = [name for name in named_leaves(params) if name.endswith(ROUTER_BIAS)]
    if len(names) != len(expert_counts):
        raise ValueError(
            f"update_router_bias: counts of {len(expert_counts)} layers for {len(names)} correction biases"
        )
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    counts = dict(zip(names, expert_counts, strict=True))

    def move(name: str, bias: jax.Array) -> jax.Array:
        if name not in counts:
            return bias
        mean, rest = jnp.divmod(jnp.sum(counts[name]), len(counts[name]))  # whole numbers: exact, and never too large
        below = jnp.where(counts[name] == mean, jnp.sign(rest), jnp.sign(mean - counts[name]))
        return bias + jnp.asarray(rate * below, bias.dtype)

    return map_leaves(move, params)


def load_imbalance(expert_counts: Int32[Array, "layers experts"]) -> Float32[Array, "layers"]:
    """Returns each layer's largest load over its mean load: 1 where experts are balanced."""
    return jnp.max(expert_counts, axis=-1) / jnp.maximum(jnp.mean(expert_counts.astype(jnp.float32), axis=-1), 1e-9)
