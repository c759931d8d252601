"""A residual block, x += mixer(norm x) and x += feed_forward(norm x), and all that devices exchange around the two.

Mixers and feed-forward layers compute on one device's arrays. Here their inputs are gathered from the residual stream,
and the sums of which each device has a part are reduced into it (`sharding.layouts`).
"""

from flax import nnx

from kimi_jax.axes import Array, Stream
from kimi_jax.config import TextConfig
from kimi_jax.model.context import Context, KDAState, LayerCache, MLACache, read_slots, write_slots
from kimi_jax.model.kda import KDA
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MLP, MoE, multiply_rows
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, reshard
from kimi_jax.model.statistics import LayerStatistics, count_choices, largest_logits
from sharding import StreamLayout, dispatch_and_combine, dispatch_pairs, first_local_expert

ONE_DEVICE = StreamLayout()


class Block(nnx.Module):
    """One layer. Its token mixer is MLA or KDA, as config.json says of this layer."""

    def __init__(self, init: Init, config: TextConfig, index: int):
        self.input_layernorm = RMSNorm(init, config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(init, config) if config.layer_kinds[index] == "mla" else KDA(init, config)
        self.post_attention_layernorm = RMSNorm(init, config.hidden_size, config.rms_norm_eps)
        moe = config.is_moe(index)
        self.mlp = MoE(init, config) if moe else MLP(init, config.hidden_size, config.intermediate_size)

    def __call__(
        self, x: Stream, context: Context, cache: LayerCache | None = None, layout: StreamLayout = ONE_DEVICE
    ) -> tuple[Stream, LayerCache | None]:
        """Maps the stream to one of the same shape and dtype, and returns the cache with the call's tokens in it."""
        mixed, cache = self.mix_tokens(x, context, cache, layout)
        x = x + mixed
        return x + self.feed_forward(x, layout), cache

    def with_statistics(
        self, x: Stream, context: Context, layout: StreamLayout = ONE_DEVICE
    ) -> tuple[Stream, LayerStatistics]:
        """Maps the stream without a cache, and returns the layer's statistics."""
        if isinstance(self.self_attn, MLA):
            h = layout.gather_rows(self.input_layernorm(layout.take_local(x)))
            y, top = self.self_attn.with_max(h, context, layout.partition)
            mixed, max_logits = layout.reduce_rows(y, "heads", x.dtype), largest_logits(top, layout)
        else:
            (mixed, _), max_logits = self.mix_tokens(x, context, None, layout), None
        x = x + mixed
        if not isinstance(self.mlp, MoE):
            return x + self.feed_forward(x, layout), LayerStatistics(None, max_logits)
        y, chosen = route_and_mix(self.mlp, self.post_attention_layernorm(x), layout, training=True)
        valid = layout.slice_rows(context.valid)
        counts = count_choices(chosen, valid, self.mlp.gate.config.n_routed_experts, layout)
        return x + y, LayerStatistics(counts, max_logits)

    def mix_tokens(
        self, x: Stream, context: Context, cache: LayerCache | None, layout: StreamLayout
    ) -> tuple[Stream, LayerCache | None]:
        """Computes the token mixer's part of the stream. KDA takes a device's tokens, MLA its rows' tokens."""
        h = self.input_layernorm(layout.take_local(x))
        if isinstance(self.self_attn, KDA):
            assert not isinstance(cache, MLACache)
            state = None if cache is None else read_slots(cache, context)
            valid = layout.slice_rows(context.valid)
            segments = None if context.segments is None else layout.slice_rows(context.segments)
            y, state = self.self_attn(h, valid, state, context.phase, layout.token_axes, segments, context.num_segments)
            cache = None if cache is None or state is None else write_slots(cache, state, context)
            return layout.reduce_local(y, "kda_heads", x.dtype), cache
        assert not isinstance(cache, KDAState)
        y, cache = self.self_attn(layout.gather_rows(h), context, cache, layout.partition)
        return layout.reduce_rows(y, "heads", x.dtype), cache

    def feed_forward(self, x: Stream, layout: StreamLayout) -> Stream:
        """Computes the feed-forward layer's part of the stream."""
        if isinstance(self.mlp, MoE):
            return mix_experts(self.mlp, self.post_attention_layernorm(x), layout)
        h = self.post_attention_layernorm(layout.take_local(x))
        return layout.reduce_rows(self.mlp(layout.gather_rows(h)), "mlp", x.dtype)


def mix_experts(moe: MoE, h: Stream, layout: StreamLayout) -> Stream:
    """Computes the mixture's part of the stream, in one of the two ways of `sharding.expert_dispatch`."""
    return route_and_mix(moe, h, layout)[0]


def route_and_mix(moe: MoE, h: Stream, layout: StreamLayout, training: bool = False) -> tuple[Stream, Array]:
    """Computes `mix_experts`, and returns the experts [tokens, j] that it chose on this device.

    The tokens are those of `layout.scatter_unique` where the layout dispatches, and else of `layout.gather_all`.
    For `training`, tokens are dispatched in the way that bounds the memory of a gradient (`sharding.pair_dispatch`).
    """
    partition, num_local, num_experts = layout.partition, moe.experts.num_local, moe.gate.config.n_routed_experts

    def sum_experts(x: Array, chosen: Array, weights: Array) -> Array:
        return moe.sum_experts(x, chosen, weights, first_local_expert(num_local, num_experts, partition))

    if not layout.dispatches:
        tokens = layout.gather_all(h)
        chosen, weights = moe.gate(tokens)
        y = sum_experts(tokens, chosen, weights)
        if moe.shared_experts is not None:
            y = y + moe.shared_experts(tokens)
        return layout.reduce_all(y, like=h), chosen
    unique = layout.scatter_unique(h)
    chosen, weights = moe.gate(unique)
    if training:
        matrices = moe.experts.operands(unique.dtype)
        y = dispatch_pairs(unique, chosen, weights, matrices, multiply_rows, num_local, num_experts, partition)
    else:
        y = dispatch_and_combine(unique, chosen, weights, sum_experts, num_local, num_experts, partition)
    y = layout.gather_unique(y, like=h)
    if moe.shared_experts is None:
        return y, chosen
    # No device has all tokens: the shared experts of each take the tokens of its rows.
    shared = reshard(moe.shared_experts, "shared_mlp", "mlp", partition)
    return y + layout.reduce_rows(shared(layout.gather_rows(h)), "mlp", h.dtype), chosen
