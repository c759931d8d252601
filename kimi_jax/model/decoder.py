"""The language model's trunk: embedding, residual blocks of a token mixer and a feed-forward, final norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Hidden, PageTable, Positions, Tokens
from kimi_jax.config import TextConfig
from kimi_jax.model.kda import KDA
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MLP, MoE
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init
from kimi_jax.state import KDAState, MLACache, State
from sharding import over_rows


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
        x: Hidden,
        positions: Positions,
        state: MLACache | KDAState | None = None,
        page_table: PageTable | None = None,
    ) -> tuple[Hidden, MLACache | KDAState | None]:
        mixed, after = self.mix(self.input_layernorm(x), positions, state, page_table)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), after

    def mix(
        self, h: Hidden, positions: Positions, state: MLACache | KDAState | None, page_table: PageTable | None
    ) -> tuple[Hidden, MLACache | KDAState | None]:
        """The token mixer, each row where its part of the state lies."""
        graph, weights = nnx.split(self.self_attn)

        def part(weights: Any, rows: Any, shard: jax.Array | int) -> tuple[Hidden, Any]:
            mixer = nnx.merge(graph, weights)
            h, positions, state, page_table = rows
            if isinstance(mixer, KDA):
                return mixer(h, positions >= 0, state)
            if state is not None:
                page_table = page_table - shard * state.pages.shape[0]
            return mixer(h, positions, state, page_table)

        return over_rows(part, weights, (h, positions, state, page_table))


class Embedding(nnx.Module):
    """`weight` [words, d]."""

    def __init__(self, init: Init, config: TextConfig):
        self.weight = init.normal((config.vocab_size, config.hidden_size), ("vocab", "embed"))

    def __call__(self, tokens: Tokens) -> Hidden:
        return self.weight[...][tokens]


class Decoder(nnx.Module):
    """Embeddings -> the hidden vectors after the final norm."""

    def __init__(self, init: Init, config: TextConfig):
        self.embed_tokens = Embedding(init, config)
        self.layers = nnx.List([Layer(init, config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(init, config.hidden_size, config.rms_norm_eps, "embed")

    def __call__(self, x: Hidden, positions: Positions, state: State | None = None) -> tuple[Hidden, State | None]:
        """x [b, t, d] at `positions` (-1 is padding, after a row's tokens) -> the same shape, and the new state."""
        if state is None:
            for layer in self.layers:
                x, _ = layer(x, positions)
            return self.norm(x), None
        carried = []
        for layer, before in zip(self.layers, state.layers, strict=True):
            x, after = layer(x, positions, before, state.page_table)
            assert after is not None
            carried.append(after)
        lengths = state.lengths + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        return self.norm(x), State(lengths, state.page_table, tuple(carried))
