"""QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1): heads whose attention logits grow too large are scaled down.

After an optimizer's step, a head whose largest score S over the step's batch is above the threshold has its scores
multiplied by gamma = threshold / S: those of its own channels by sqrt(gamma) on both sides, those of the rotated ones
by gamma on the query's side alone, since all heads share the rotated key.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from kimi_jax.config import KimiConfig, TextConfig
from kimi_jax.training.leaves import map_leaves


def qk_clip(
    params: Any,
    max_logits: Float32[Array, "layers heads"],
    config: KimiConfig | TextConfig,
    threshold: float | int = 100.0,
) -> Any:
    """Returns the parameters with the query and key projections of heads above the threshold scaled down.

    Args:
      params: a model's parameters, or those of them that are trained; `q_b_proj` (`q_proj` without a query rank) and
        `kv_b_proj` are looked for by name.
      max_logits: the largest scaled score of each head in each MLA layer, in order, over all microbatches and devices
        (`Statistics.max_logits`); -inf for none.
      threshold: tau. Heads at or below it stay bit for bit.

    Raises:
      ValueError: `max_logits` is not of the model's MLA layers and heads.
    """
    text = config.text if isinstance(config, KimiConfig) else config
    layers = [i for i, kind in enumerate(text.layer_kinds) if kind == "mla"]
    expected = (len(layers), text.num_attention_heads)
    if jnp.shape(max_logits) != expected:
        raise ValueError(f"qk_clip: max_logits have shape {jnp.shape(max_logits)}, expected {expected} [layers, heads]")
    above = max_logits > threshold
    gamma = jnp.where(above, threshold / jnp.where(above, max_logits, 1), 1)
    factors = {}
    for layer, own in zip(layers, gamma, strict=True):
        prefix = f"model.layers.{layer}.self_attn"
        query = _per_row(jnp.sqrt(own), text.qk_nope_head_dim, own, text.qk_rope_head_dim)
        factors[f"{prefix}.q_b_proj.weight"] = factors[f"{prefix}.q_proj.weight"] = query
        factors[f"{prefix}.kv_b_proj.weight"] = _per_row(
            jnp.sqrt(own), text.qk_nope_head_dim, jnp.ones_like(own), text.v_head_dim
        )

    def scale(name: str, weight: jax.Array) -> jax.Array:
        if name not in factors:
            return weight
        return (weight.astype(jnp.float32) * factors[name][:, None]).astype(weight.dtype)

    return map_leaves(scale, params)


def _per_row(first: jax.Array, first_width: int, last: jax.Array, last_width: int) -> Float32[Array, "rows"]:
    """Repeats two numbers of each head for the rows of its two kinds of channels."""
    heads = len(first)
    parts = [jnp.broadcast_to(x[:, None], (heads, width)) for x, width in ((first, first_width), (last, last_width))]
    return jnp.concatenate(parts, axis=1).reshape(-1)
