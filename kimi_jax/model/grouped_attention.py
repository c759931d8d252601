"""Grouped-query attention (arXiv 2305.13245) with Llama's rotation, as draft heads in Llama's form have it.

It is latent attention whose cache holds the keys and values themselves: [k | v] of each of their heads, side by side.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from kimi_jax.axes import Float, Inputs, Latents, Positions, Queries
from kimi_jax.config import TextConfig
from kimi_jax.model import rope
from kimi_jax.model.context import Context, MLACache
from kimi_jax.model.mla import MLA
from kimi_jax.model.param import Init, Linear
from sharding import SINGLE_DEVICE, Partition


class GroupedAttention(MLA):
    """Causal attention of one layer, of `kv_heads` heads of keys and values; all channels of a head are rotated."""

    def __init__(self, init: Init, config: TextConfig, kv_heads: int, inputs: int):
        """Draws weights for vectors of width `inputs`; it returns vectors of `hidden_size`."""
        self.config = config
        heads, width = config.num_attention_heads, config.qk_rope_head_dim
        self.q_proj = Linear(init, heads * width, inputs, ("heads", "embed"))
        self.k_proj = Linear(init, kv_heads * width, inputs, ("heads", "embed"))
        self.v_proj = Linear(init, kv_heads * width, inputs, ("heads", "embed"))
        self.g_proj = None
        self.o_proj = Linear(init, config.hidden_size, heads * width, ("embed", "heads"))

    def __call__(
        self, x: Inputs, context: Context, cache: MLACache | None = None, partition: Partition = SINGLE_DEVICE
    ) -> tuple[Float[jax.Array, "b t d"], MLACache | None]:
        """Mixes x [b, t, i] as latent attention does; a decode step is a prefill of one token."""
        return super().__call__(x, dataclasses.replace(context, phase="prefill"), cache, partition)

    def project(self, x: Inputs, positions: Positions, partition: Partition) -> tuple[Queries, Latents]:
        """Computes the rotated queries of this device's heads, and their [rotated key | value], which the cache
        keeps."""
        width = self.config.qk_rope_head_dim
        q, k, v = (
            rearrange(proj(x), "b t (h k) -> b t h k", k=width) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self.rotate(y, positions) for y in (q, k))
        return q, rearrange(jnp.stack([k, v]), "two b t g k -> b t (g two k)")

    def rotate(self, x: Queries, positions: Positions) -> Queries:
        """Rotates each head's channel i with channel i + k / 2, the pairs of Llama's checkpoints."""
        return rope.apply(rearrange(x, "b t h (two half) -> b t h (half two)", two=2), positions, self.config)

    @property
    def softmax_scale(self) -> float:
        """Returns the factor of the scores, which Llama's YaRN does not change."""
        return self.config.qk_rope_head_dim**-0.5

    def keys_and_values(
        self, latents: Latents, heads: int
    ) -> tuple[Float[jax.Array, "b s h k"], Float[jax.Array, "b s h v"]]:
        """Reads the keys and values of what the cache keeps, each for all of the heads that share it."""
        width = self.config.qk_rope_head_dim
        k, v = rearrange(latents, "b s (g two k) -> two b s g k", two=2, k=width)
        group = heads // k.shape[2]
        return jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
