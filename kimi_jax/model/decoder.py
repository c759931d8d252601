"""The language model's trunk: embedding, residual blocks of a token mixer and a feed-forward, final norm."""

import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Hidden, Stream, Tokens
from kimi_jax.config import TextConfig
from kimi_jax.model.context import Context, KDAState, LayerCache, MLACache, read_slots, write_slots
from kimi_jax.model.kda import KDA
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MLP, MoE
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init
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
        self, x: Stream, context: Context, cache: LayerCache | None = None, layout: StreamLayout = SINGLE_DEVICE
    ) -> tuple[Stream, LayerCache | None]:
        mixed, cache = self.mix(x, context, cache, layout)
        x = x + mixed
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(h, layout), cache
        return x + layout.reduce_rows(self.mlp(layout.gather_tokens(h)), "mlp", x.dtype), cache

    def mix(
        self, x: Stream, context: Context, cache: LayerCache | None, layout: StreamLayout
    ) -> tuple[Stream, LayerCache | None]:
        """The token mixer. KDA takes the tokens where they lie, MLA's heads those of the whole row."""
        h = self.input_layernorm(layout.gather_tokens(x) if layout.replicated else x)
        if isinstance(self.self_attn, KDA):
            assert not isinstance(cache, MLACache)
            state = None if cache is None else read_slots(cache, context)
            own = layout.slice_tokens(context.valid)
            segments = None if context.segments is None else layout.slice_tokens(context.segments)
            y, state = self.self_attn(h, own, state, context.phase, layout.token_axes, segments)
            cache = None if cache is None or state is None else write_slots(cache, state, context)
            return layout.reduce_tokens(y, "kda_heads", h.dtype), cache
        assert not isinstance(cache, KDAState)
        h = h if layout.replicated else layout.gather_tokens(h)
        heads, cache = self.self_attn(h, context, cache)
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
        self,
        x: Stream,
        context: Context,
        caches: tuple[LayerCache, ...] | None = None,
        layout: StreamLayout = SINGLE_DEVICE,
    ) -> tuple[Stream, tuple[LayerCache, ...] | None]:
        """The stream x [b, t, d] of the tokens that `context` describes -> the same shape, and each layer's cache with
        them in it."""
        if caches is None:
            for layer in self.layers:
                x, _ = layer(x, context, layout=layout)
            return self.norm(x), None
        after = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, with_tokens = layer(x, context, cache, layout)
            assert with_tokens is not None
            after.append(with_tokens)
        return self.norm(x), tuple(after)
