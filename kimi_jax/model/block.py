"""A residual block, x += mixer(norm x) and x += feed_forward(norm x), and all that devices exchange around the two.

With attention residuals (`residual`) the norms take an average of x and its snapshots, and some blocks begin a new sum.

Mixers and feed-forward layers compute on one device's arrays. Here their inputs are gathered from the residual stream,
and the sums of which each device has a part are reduced into it (`sharding.layouts`).
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Array, Float32, Hidden, Stream
from kimi_jax.config import TextConfig
from kimi_jax.model.context import Context, KDAState, LayerCache, MLACache, read_slots, write_slots
from kimi_jax.model.kda import KDA
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MLP, MoE, choose_activation, multiply_rows
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, Linear, reshard
from kimi_jax.model.residual import ResidualStream, norm_stream
from kimi_jax.model.statistics import LayerStatistics, count_choices, largest_logits
from sharding import StreamLayout, dispatch_and_combine, dispatch_pairs, first_local_expert

ONE_DEVICE = StreamLayout()


class Block(nnx.Module):
    """One layer. Its token mixer is MLA or KDA, as config.json says of this layer."""

    def __init__(self, init: Init, config: TextConfig, index: int):
        self.input_layernorm = RMSNorm(init, config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(init, config) if config.layer_kinds[index] == "mla" else KDA(init, config)
        self.post_attention_layernorm = RMSNorm(init, config.hidden_size, config.rms_norm_eps)
        activation = choose_activation(config)
        moe = config.is_moe(index)
        self.mlp = MoE(init, config) if moe else MLP(init, config.hidden_size, config.intermediate_size, activation)
        every = config.attn_res_block_size
        self.takes_snapshot = every is not None and index % every == 0
        self.self_attention_res_norm, self.self_attention_res_proj = depth_attention(init, config)
        self.mlp_res_norm, self.mlp_res_proj = depth_attention(init, config)

    def __call__(
        self, x: ResidualStream, context: Context, cache: LayerCache | None = None, layout: StreamLayout = ONE_DEVICE
    ) -> tuple[ResidualStream, LayerCache | None]:
        """Maps the stream to one of the same shape and dtype, and returns the cache with the call's tokens in it, or
        beside it in a verification."""
        x, cache = self.mix_tokens(x, context, cache, layout)
        return self.feed_forward(x, layout), cache

    def with_statistics(
        self, x: ResidualStream, context: Context, layout: StreamLayout = ONE_DEVICE
    ) -> tuple[ResidualStream, LayerStatistics]:
        """Maps the settled stream to one without a cache, and returns the layer's statistics."""
        if isinstance(self.self_attn, MLA):
            h = layout.gather_rows(self.mixer_input(x, layout)[1])
            y, top = self.self_attn.with_max(h, context, layout.partition)
            mixed, max_logits = layout.reduce_rows(y, "heads", x.prefix.dtype), largest_logits(top, layout)
            x = self.add_mixed(x, mixed).settled()
        else:
            (x, _), max_logits = self.mix_tokens(x, context, None, layout), None
            x = x.settled()
        if not isinstance(self.mlp, MoE):
            return self.feed_forward(x, layout).settled(), LayerStatistics(None, max_logits)
        y, chosen = route_and_mix(self.mlp, self.forward_input(x, layout)[1], layout, training=True)
        valid = layout.slice_rows(context.valid)
        counts = count_choices(chosen, valid, self.mlp.gate.config.n_routed_experts, layout)
        return x.add(y).settled(), LayerStatistics(counts, max_logits)

    def mixer_input(self, x: ResidualStream, layout: StreamLayout = ONE_DEVICE) -> tuple[ResidualStream, Hidden]:
        """Returns the settled stream, and the normed vectors of this device's tokens, which the token mixer takes."""
        return norm_stream(
            x, self.input_layernorm, (self.self_attention_res_norm, self.self_attention_res_proj), layout
        )

    def forward_input(self, x: ResidualStream, layout: StreamLayout = ONE_DEVICE) -> tuple[ResidualStream, Stream]:
        """Returns the settled stream, and the normed vectors that the feed-forward layer takes: a mixture takes those
        of the whole stream, any other layer those of this device's tokens."""
        part = ONE_DEVICE if isinstance(self.mlp, MoE) else layout
        return norm_stream(x, self.post_attention_layernorm, (self.mlp_res_norm, self.mlp_res_proj), part)

    def add_mixed(self, x: ResidualStream, mixed: Stream) -> ResidualStream:
        """Adds the token mixer's part to the stream, whose sum begins again where a block of layers does."""
        return x.restart(mixed) if self.takes_snapshot else x.add(mixed)

    def mix_tokens(
        self, x: ResidualStream, context: Context, cache: LayerCache | None, layout: StreamLayout
    ) -> tuple[ResidualStream, LayerCache | None]:
        """Adds the token mixer's part to the stream. KDA takes a device's tokens, MLA its rows' tokens."""
        x, h = self.mixer_input(x, layout)
        dtype = x.prefix.dtype
        if isinstance(self.self_attn, KDA):
            assert cache is None or isinstance(cache, KDAState)
            state = None if cache is None else read_slots(cache, context)
            valid = layout.slice_rows(context.valid)
            segments = None if context.segments is None else layout.slice_rows(context.segments)
            y, new = self.self_attn(h, valid, state, context.phase, layout.token_axes, segments, context.num_segments)
            after = write_slots(cache, new, context) if cache is not None and isinstance(new, KDAState) else new
            return self.add_mixed(x, layout.reduce_local(y, "kda_heads", dtype)), after
        assert cache is None or isinstance(cache, MLACache)
        y, cache = self.self_attn(layout.gather_rows(h), context, cache, layout.partition)
        return self.add_mixed(x, layout.reduce_rows(y, "heads", dtype)), cache

    def feed_forward(self, x: ResidualStream, layout: StreamLayout) -> ResidualStream:
        """Adds the feed-forward layer's part to the stream."""
        x, h = self.forward_input(x, layout)
        if isinstance(self.mlp, MoE):
            return x.add(mix_experts(self.mlp, h, layout))
        return x.add(layout.reduce_rows(self.mlp(layout.gather_rows(h)), "mlp", x.prefix.dtype))


def depth_attention(init: Init, config: TextConfig) -> tuple[RMSNorm | None, Linear | None]:
    """Makes the norm and the projection with which `read_stream` scores sources; none without attention residuals."""
    if config.attn_res_block_size is None:
        return None, None
    # Not sharded in training either: a few numbers, which are used outside of layers too
    proj = Linear(init, 1, config.hidden_size, (None, None))
    return RMSNorm(init, config.hidden_size, config.rms_norm_eps), proj


def mix_experts(moe: MoE, h: Stream, layout: StreamLayout) -> Stream:
    """Computes the mixture's part of the stream, in one of the two ways of `sharding.expert_dispatch`."""
    return route_and_mix(moe, h, layout)[0]


def route_and_mix(moe: MoE, h: Stream, layout: StreamLayout, training: bool = False) -> tuple[Stream, Array]:
    """Computes `mix_experts`, and returns the experts [tokens, j] that it chose on this device.

    The tokens are those of `layout.scatter_unique` where the layout dispatches, and else of `layout.gather_all`.
    For `training`, tokens are dispatched in the way that bounds the memory of a gradient (`sharding.pair_dispatch`),
    and experts chosen in plain JAX, whose gradient it is.
    """
    partition, num_local, num_experts = layout.partition, moe.experts.num_local, moe.gate.config.n_routed_experts
    gate = partial(moe.gate, implementation="xla" if training else None)

    def sum_experts(x: Array, chosen: Array, weights: Array) -> Array:
        return moe.sum_experts(x, chosen, weights, first_local_expert(num_local, num_experts, partition))

    if not layout.dispatches:
        tokens = layout.gather_all(h)
        chosen, weights = gate(tokens)
        routed = sum_experts(moe.project_down(tokens), chosen, weights)
        of_shared = None if moe.shared_experts is None else moe.shared_experts(tokens)
        return reduce_sums(moe, routed, of_shared, h, layout), chosen
    unique = layout.scatter_unique(h)
    chosen, weights = gate(unique)
    x = moe.project_down(unique)
    if training:
        matrices, compute = moe.experts.operands(x.dtype), partial(multiply_rows, activation=moe.activation)
        y = dispatch_pairs(x, chosen, weights, matrices, compute, num_local, num_experts, partition)
    else:
        y = dispatch_and_combine(x, chosen, weights, sum_experts, num_local, num_experts, partition)
    y = layout.gather_unique(moe.project_up(y, h.dtype), like=h)
    if moe.shared_experts is None:
        return y, chosen
    # No device has all tokens: the shared experts of each take the tokens of its rows.
    shared = reshard(moe.shared_experts, "shared_mlp", "mlp", partition)
    return y + layout.reduce_rows(shared(layout.gather_rows(h)), "mlp", h.dtype), chosen


def reduce_sums(
    moe: MoE,
    routed: Float32[Array, "all width"],
    shared: Float32[Array, "all d"] | None,
    h: Stream,
    layout: StreamLayout,
) -> Stream:
    """Adds all devices' parts of the routed and the shared experts' sums, into a stream shaped like `h`.

    Latent experts' sums are whole before their norm. They travel beside the shared experts', in one message.
    """
    if not moe.is_latent:
        return layout.reduce_all(routed if shared is None else routed + shared, like=h)
    sums = routed if shared is None else jnp.concatenate([routed, shared], axis=-1)
    whole = layout.reduce_all(sums, like=h)
    y = moe.project_up(whole[..., : routed.shape[-1]], h.dtype)
    return y if shared is None else y + whole[..., routed.shape[-1] :]
