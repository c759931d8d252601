"""The language model's trunk: embedding, residual blocks of a token mixer and a feed-forward, final norm."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Hidden, PageTable, Positions, Stream, Tokens
from kimi_jax.config import TextConfig
from kimi_jax.model.kda import KDA
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MLP, MoE
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init
from kimi_jax.state import KDAState, MLACache, State
from sharding import SINGLE_DEVICE, StreamLayout, shard_index


class Layer(nnx.Module):
    """x += mixer(norm x); x += feed_forward(norm x). The mixer is MLA or KDA, as config.json says of this layer."""

    def __init__(self, init: Init, config: TextConfig, index: int):
        self.input_layernorm = RMSNorm(init, config.hidden_size, config.rms_norm_eps, "embed")
        self.self_attn = MLA(init, config) if config.layer_kinds[index] == "mla" else KDA(init, config)
        self.post_attention_layernorm = RMSNorm(init, config.hidden_size, config.rms_norm_eps, "embed")
        moe = config.is_moe(index)
        self.mlp = MoE(init, config) if moe else MLP(init, config.hidden_size, config.intermediate_size)

    def __call__(
        self,
        x: Stream,
        positions: Positions,
        state: MLACache | KDAState | None = None,
        page_table: PageTable | None = None,
        layout: StreamLayout = SINGLE_DEVICE,
    ) -> tuple[Stream, MLACache | KDAState | None]:
        mixed, after = self.mix(x, positions, state, page_table, layout)
        x = x + mixed
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(h, layout), after
        return x + layout.reduce_rows(self.mlp(layout.gather_tokens(h)), "mlp", x.dtype), after

    def mix(
        self, x: Stream, positions: Positions, state: Any, page_table: PageTable | None, layout: StreamLayout
    ) -> tuple[Stream, Any]:
        """The token mixer. KDA takes the tokens where they lie, MLA's heads those of the whole row."""
        h = self.input_layernorm(layout.gather_tokens(x) if layout.replicated else x)
        if isinstance(self.self_attn, KDA):
            y, after = self.self_attn(h, layout.slice_tokens(positions) >= 0, state, layout.token_axes)
            return layout.reduce_tokens(y, "kda_heads", h.dtype), after
        h = h if layout.replicated else layout.gather_tokens(h)
        heads, cache = self.self_attn(h, positions, state, page_table)
        return layout.reduce_rows(heads, "heads", h.dtype), cache


class Embedding(nnx.Module):
    """`weight` [words, d]; where the words are split, a token's vector comes from the device that has it."""

    def __init__(self, init: Init, config: TextConfig):
        self.weight = init.normal((config.vocab_size, config.hidden_size), ("vocab", "embed"))

    def __call__(self, tokens: Tokens) -> Hidden:
        words = self.weight.shape[0]
        local = tokens - words * shard_index("vocab")
        x = self.weight[...][jnp.clip(local, 0, words - 1)]
        return jnp.where(((local >= 0) & (local < words))[:, :, None], x, 0)


class Decoder(nnx.Module):
    """Embeddings -> the hidden vectors after the final norm."""

    def __init__(self, init: Init, config: TextConfig):
        self.embed_tokens = Embedding(init, config)
        self.layers = nnx.List([Layer(init, config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(init, config.hidden_size, config.rms_norm_eps, "embed")

    def __call__(
        self, x: Stream, positions: Positions, state: State | None = None, layout: StreamLayout = SINGLE_DEVICE
    ) -> tuple[Stream, State | None]:
        """The stream x [b, t, d], its rows' `positions` (-1 is padding, after a row's tokens) -> the same shape, and
        the new state."""
        if state is None:
            for layer in self.layers:
                x, _ = layer(x, positions, layout=layout)
            return self.norm(x), None
        carried = []
        for layer, before in zip(self.layers, state.layers, strict=True):
            x, after = layer(x, positions, before, state.page_table, layout)
            assert after is not None
            carried.append(after)
        lengths = state.lengths + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        return self.norm(x), State(lengths, state.page_table, tuple(carried))
