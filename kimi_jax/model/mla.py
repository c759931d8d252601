"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with RoPE or without (Kimi Linear's NoPE).

Two forms of the same sums. *Expanded*, for prefill: keys and values of every head are made from the latents.
*Absorbed*, for decoding: `kv_b_proj` is folded into the query and the output, so that a step reads only latents.
The cache holds [normed latent | rotated k_pe] of each token.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from kimi_jax.axes import (
    Float,
    Float32,
    Hidden,
    Inputs,
    Int32,
    Latents,
    LogSumExp,
    PageTable,
    Positions,
    Queries,
    Values,
)
from kimi_jax.config import TextConfig
from kimi_jax.model import rope
from kimi_jax.model.context import PAGE, Context, MLACache
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, Linear
from pallas_kernels import merge_partials, mla_decode, mla_output, mla_prefill, mla_query, mla_write
from sharding import (
    SINGLE_DEVICE,
    Partition,
    exchange_partials,
    gather_blocks,
    gather_columns,
    gather_pages,
    local_lengths,
    local_positions,
    longest_length,
    ring_page_numbers,
)

# Pages of history that a prefill expands into keys and values at a time.
HISTORY_PAGES = 16


class MLA(nnx.Module):
    """Causal attention of one layer."""

    def __init__(self, init: Init, config: TextConfig, inputs: int | None = None):
        """Draws weights for vectors of width `inputs`, by default the `hidden_size` of what it returns."""
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size if inputs is None else inputs
        if config.q_lora_rank is None:
            self.q_proj = Linear(init, heads * config.qk_head_dim, hidden, ("heads", "embed"))
        else:
            self.q_a_proj = Linear(init, config.q_lora_rank, hidden, ("latent", "embed"))
            self.q_a_layernorm = RMSNorm(init, config.q_lora_rank, config.mla_inner_norm_eps)
            self.q_b_proj = Linear(init, heads * config.qk_head_dim, config.q_lora_rank, ("heads", "rank"))
        self.kv_a_proj_with_mqa = Linear(init, config.latent_dim, hidden, ("latent", "embed"))
        self.kv_a_layernorm = RMSNorm(init, config.kv_lora_rank, config.mla_inner_norm_eps)
        kv_width = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = Linear(init, heads * kv_width, config.kv_lora_rank, ("heads", "rank"))
        gated, width = config.mla_use_output_gate, heads * config.v_head_dim
        self.g_proj = Linear(init, width, hidden, ("heads", "embed")) if gated else None
        self.o_proj = Linear(init, config.hidden_size, heads * config.v_head_dim, ("embed", "heads"))

    def __call__(
        self, x: Inputs, context: Context, cache: MLACache | None = None, partition: Partition = SINGLE_DEVICE
    ) -> tuple[Float32[jax.Array, "b t d"], MLACache | None]:
        """Mixes x [b, t, i] of the tokens that `context` describes.

        Returns this device's heads' part of the sum for the stream, and the cache with these tokens in it. A decode
        step attends in the absorbed form, prefill in the expanded one.
        """
        table = context.page_table
        if cache is None or table is None:
            q, latents = self.project(x, context.positions, partition)
            return self.output(self.within(q, latents, context)[0], x), None
        if context.phase != "prefill":
            return self.absorbed(x, context.positions, cache, table, partition)
        q, latents = self.project(x, context.positions, partition)
        cache = MLACache(mla_write(cache.pages, latents, *self.places(context, table, partition)))
        return self.output(self.with_history(q, latents, context, cache, table, partition), x), cache

    def with_max(
        self, x: Hidden, context: Context, partition: Partition = SINGLE_DEVICE
    ) -> tuple[Float32[jax.Array, "b t d"], Float32[jax.Array, "b h"]]:
        """Mixes x [b, t, d] without a cache, and returns each row's largest score of this device's heads."""
        q, latents = self.project(x, context.positions, partition)
        out, _, top = self.attend(q, latents, context, context.positions, self.segments(context))
        assert top is not None
        return self.output(out, x), top

    def places(
        self, context: Context, table: PageTable, partition: Partition
    ) -> tuple[Int32[jax.Array, "b pages"], Positions]:
        """Returns a page table for each row, and the tokens' positions in it on this device.

        Where sequences are packed, their tables follow one another.
        """
        positions, rows = local_positions(context.positions, PAGE, partition), len(context.positions)
        if context.segments is None:
            return table, positions
        shifted = positions + context.segments * table.shape[1] * PAGE
        return table.reshape(rows, -1), jnp.where(positions < 0, -1, shifted)

    def low_ranks(self, x: Float[jax.Array, "... i"], partition: Partition) -> tuple[jax.Array, jax.Array]:
        """Computes the source of queries, before its norm where it has one, and [latent | k_pe] before theirs."""
        config, names = self.config, partition.axis_names("latent")
        if config.q_lora_rank is None:
            (kv,) = gather_columns([self.kv_a_proj_with_mqa(x)], [config.latent_dim], names)
            return x, kv
        low = [self.q_a_proj(x), self.kv_a_proj_with_mqa(x)]
        q_a, kv = gather_columns(low, [config.q_lora_rank, config.latent_dim], names)
        return q_a, kv

    def low_rank_shards(self, x: Float[jax.Array, "n i"], partition: Partition) -> tuple[jax.Array | None, jax.Array]:
        """Computes `low_ranks` of x [n, i] as `mla_query` takes them: what all devices have, side by side."""
        config, names, kv = self.config, partition.axis_names("latent"), self.kv_a_proj_with_mqa(x)
        sharded = kv.shape[-1] < config.latent_dim
        if config.q_lora_rank is None:
            return x, gather_blocks([kv], names if sharded else ())
        q_a = self.q_a_proj(x)
        if sharded and q_a.shape[-1] < config.q_lora_rank:
            return None, gather_blocks([q_a, kv], names)
        q_a, kv = gather_columns([q_a, kv], [config.q_lora_rank, config.latent_dim], names)
        return q_a, kv[None]

    def project(self, x: Inputs, positions: Positions, partition: Partition) -> tuple[Queries, Latents]:
        """Computes [nope | rotated] of this device's heads, and [normed latent | rotated k_pe], which the cache
        keeps."""
        config = self.config
        q_a, kv = self.low_ranks(x, partition)
        flat = self.q_proj(q_a) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(q_a))
        q = rearrange(flat, "b t (h k) -> b t h k", k=config.qk_head_dim)
        nope, q_pe = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        c, k_pe = jnp.split(kv, [config.kv_lora_rank], axis=-1)
        k_pe = rope.apply(k_pe[:, :, None], positions, config)[:, :, 0]
        return (
            jnp.concatenate([nope, rope.apply(q_pe, positions, config)], axis=-1),
            jnp.concatenate([self.kv_a_layernorm(c), k_pe], axis=-1),
        )

    def output(self, heads: Values, x: Inputs) -> Float32[jax.Array, "b t d"]:
        """Computes this device's heads' part of the sum for the stream, o_proj(heads * sigmoid(g_proj x))."""
        values = rearrange(heads, "b t h v -> b t (h v)")
        if self.g_proj is not None:
            gate = jax.nn.sigmoid(self.g_proj(x).astype(jnp.float32))
            values = (values.astype(jnp.float32) * gate).astype(values.dtype)
        return self.o_proj(values, dtype=jnp.float32)

    def within(self, q: Queries, latents: Latents, context: Context) -> tuple[Values, LogSumExp]:
        """Attends from the tokens of a call to one another."""
        return self.expanded(q, latents, context, context.positions, self.segments(context))

    def segments(self, context: Context) -> Positions:
        """Returns each token's sequence in its row, -1 for padding."""
        return jnp.where(context.valid, 0, -1) if context.segments is None else context.segments

    def expanded(
        self,
        q: Queries,
        latents: Latents,
        context: Context,
        kv_positions: Int32[jax.Array, "b s"],
        kv_segments: Int32[jax.Array, "b s"],
    ) -> tuple[Values, LogSumExp]:
        """Attends to keys and values made from `latents`; also returns the log-sum-exp of the scores [b, t, h]."""
        out, lse, _ = self.attend(q, latents, context, kv_positions, kv_segments, return_max=False)
        return out, lse

    def attend(
        self,
        q: Queries,
        latents: Latents,
        context: Context,
        kv_positions: Int32[jax.Array, "b s"],
        kv_segments: Int32[jax.Array, "b s"],
        return_max: bool = True,
    ) -> tuple[Values, LogSumExp, Float32[jax.Array, "b h"] | None]:
        """Computes `expanded`, and the largest score of each row and head where asked."""
        k, v = self.keys_and_values(latents, q.shape[2])
        out, lse, *top = mla_prefill(
            q,
            k,
            v,
            q_positions=context.positions,
            kv_positions=kv_positions,
            kv_segments=kv_segments,
            q_segments=jnp.zeros_like(context.positions) if context.segments is None else context.segments,
            scale=self.softmax_scale,
            return_lse=True,
            return_max=return_max,
        )
        return out, lse, top[0] if return_max else None

    @property
    def softmax_scale(self) -> float:
        """Returns the factor of the scores."""
        return rope.softmax_scale(self.config)

    def keys_and_values(
        self, latents: Latents, heads: int
    ) -> tuple[Float[jax.Array, "b s h k"], Float[jax.Array, "b s h v"]]:
        """Computes the keys and values of this device's `heads` heads, of what the cache keeps."""
        c, pe = jnp.split(latents, [self.config.kv_lora_rank], axis=-1)
        kv = rearrange(self.kv_b_proj(c), "b s (h kv) -> b s h kv", h=heads)
        k, v = jnp.split(kv, [self.config.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([k, jnp.broadcast_to(pe[:, :, None], (*k.shape[:-1], pe.shape[-1]))], axis=-1), v

    def with_history(
        self,
        q: Queries,
        latents: Latents,
        context: Context,
        cache: MLACache,
        table: PageTable,
        partition: Partition,
    ) -> Values:
        """Attends to these tokens and to the cached ones before them, a few pages of each sequence at a time."""
        rows, devices = len(context.positions), partition.num_shards("row_pages")
        packed = len(table) // rows
        start, table = context.starts().reshape(rows, packed), table.reshape(rows, packed, -1)
        # of each device's pages of a sequence
        span = min(max(1, HISTORY_PAGES // (devices * packed)), table.shape[2])
        sequence = jnp.arange(packed)[:, None, None]

        def piece(i: jax.Array, merged: tuple[Values, LogSumExp]) -> tuple[Values, LogSumExp]:
            # the last piece may begin early, so as to stay inside the table; what an earlier one covered is masked
            first = jnp.minimum(i * span, table.shape[2] - span)
            pages = cache.pages[jax.lax.dynamic_slice_in_dim(table, first, span, axis=2)]
            history = gather_pages(rearrange(pages, "b n p c page -> b (n p page) c").astype(q.dtype), partition)
            number = ring_page_numbers(first, span, partition)[:, None, :, None]  # of devices, sequences, pages, tokens
            at = number * PAGE + jnp.arange(PAGE)
            seen = (at >= i * span * devices * PAGE) & (at < start[:, None, :, None, None])
            at, owner = (jnp.where(seen, x, -1).reshape(rows, -1) for x in (at, sequence))
            return merge_partials(merged, self.expanded(q, history, context, at, owner))

        pieces = -(-longest_length(start.reshape(-1), partition) // (span * devices * PAGE))
        # Where all pages are one piece, XLA makes its keys and values before the loop, also of a loop of no turns.
        merged = jax.lax.cond(
            pieces > 0,
            lambda merged: jax.lax.fori_loop(0, pieces, piece, merged),
            lambda merged: merged,
            self.within(q, latents, context),
        )
        return merged[0]

    def absorbed(
        self,
        x: Inputs,
        positions: Positions,
        cache: MLACache,
        page_table: PageTable,
        partition: Partition,
    ) -> tuple[Float32[jax.Array, "b t d"], MLACache]:
        """Writes a few tokens of each row into the cache, and attends from each to it and to those before it."""
        rows, flat, at = len(x), rearrange(x, "b t i -> (b t) i"), positions.reshape(-1)
        config, (q_a, kv_a) = self.config, self.low_rank_shards(flat, partition)
        q_b, norm = (
            (self.q_proj, None) if config.q_lora_rank is None else (self.q_b_proj, self.q_a_layernorm.weight[...])
        )
        kv_b = self.kv_b_proj.weight[...]
        q, latents = mla_query(
            q_a,
            kv_a,
            rope.rotation(at, config),
            norm,
            self.kv_a_layernorm.weight[...],
            q_b.weight[...],
            kv_b,
            heads=kv_b.shape[0] // (config.qk_nope_head_dim + config.v_head_dim),
            eps=config.mla_inner_norm_eps,
        )
        own = local_positions(positions, PAGE, partition)
        cache = MLACache(mla_write(cache.pages, latents.reshape(*own.shape, -1), page_table, own))
        tokens, devices = own.shape[1], partition.num_shards("row_pages")
        q = gather_pages(rearrange(q, "(b t) h c -> b (h t) c", b=rows), partition)
        lengths = local_lengths(at + 1, PAGE, partition).reshape(own.shape)
        found = mla_decode(
            rearrange(q, "b (h t) c -> b h t c", t=tokens),
            cache.pages,
            page_table,
            lengths,
            latent=config.kv_lora_rank,
            scale=rope.softmax_scale(config),
            shards=devices if devices > 1 else None,
        )
        assert isinstance(found, jax.Array)
        if devices > 1:
            packed = exchange_partials(rearrange(found, "s b h t c -> s b (h t) c"), partition)
            o = rearrange(packed, "s b (h t) c -> s (b t) h c", t=tokens)
        else:
            o = rearrange(found, "b h t c -> (b t) h c")
        gate = None if self.g_proj is None else self.g_proj(flat)
        return mla_output(o, kv_b, self.o_proj.weight[...], gate).reshape(*own.shape, -1), cache
