"""Grouped-query attention (arXiv 2305.13245) with Llama's rotation, as draft heads in Llama's form have it.

It is latent attention whose cache holds the values and keys themselves: [v | k] of each of their heads, side by side.
The absorbed form is then that of heads which each have a cache of their own: values stand where latents do, keys where
their rotated part does, and a query has nothing for the values.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from kimi_jax.axes import Float, Inputs, Latents, PageTable, Positions, Queries
from kimi_jax.config import TextConfig
from kimi_jax.model import rope
from kimi_jax.model.context import MLACache
from kimi_jax.model.mla import MLA
from kimi_jax.model.param import Init, Linear
from pallas_kernels import mla_decode, mla_write
from sharding import Partition


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

    def project(self, x: Inputs, positions: Positions, partition: Partition) -> tuple[Queries, Latents]:
        """Computes the rotated queries of this device's heads, and their [value | rotated key], which the cache
        keeps."""
        width = self.config.qk_rope_head_dim
        q, k, v = (
            rearrange(proj(x), "b t (h k) -> b t h k", k=width) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self.rotate(y, positions) for y in (q, k))
        return q, rearrange(jnp.stack([v, k]), "two b t g k -> b t (g two k)")

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
        v, k = rearrange(latents, "b s (g two k) -> two b s g k", two=2, k=width)
        group = heads // k.shape[2]
        return jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)

    def absorbed(
        self,
        x: Inputs,
        positions: Positions,
        cache: MLACache,
        page_table: PageTable,
        partition: Partition,
    ) -> tuple[Float[jax.Array, "b t d"], MLACache]:
        """Writes a few tokens of each row into the cache, and attends from each to it and to those before it. The mesh
        leaves rows of the cache whole."""
        q, latents = self.project(x, positions, partition)
        cache = MLACache(mla_write(cache.pages, latents, page_table, positions))
        # Each head of a page is a page of its own, and each head of a row a row
        groups = latents.shape[2] // (2 * q.shape[3])
        pages = rearrange(cache.pages, "p (g c) page -> (p g) c page", g=groups)
        table = rearrange(page_table[:, None] * groups + jnp.arange(groups)[:, None], "b g n -> (b g) n")
        queries = rearrange(q, "b t (g h) k -> (b g) h t k", g=groups).astype(pages.dtype)
        lengths = jnp.repeat(positions + 1, groups, axis=0)
        queries = jnp.concatenate([jnp.zeros_like(queries), queries], axis=-1)  # nothing looks at the values
        width, scale = q.shape[3], self.softmax_scale
        out, _ = mla_decode(queries, pages, table, lengths, latent=width, scale=scale, return_lse=True)
        return self.output(rearrange(out, "(b g) h t k -> b t (g h) k", g=groups).astype(q.dtype), x), cache
