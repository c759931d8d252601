"""The language model's trunk: embedding, residual blocks, final norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Hidden, Stream, Tokens
from kimi_jax.config import TextConfig
from kimi_jax.model.block import ONE_DEVICE, Block, depth_attention
from kimi_jax.model.context import Context, LayerCache
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, gather_weights
from kimi_jax.model.residual import ResidualStream, norm_stream
from kimi_jax.model.statistics import LayerStatistics
from sharding import SINGLE_DEVICE, Partition, StreamLayout


class Embedding(nnx.Module):
    """`weight` [words, d]. Where words are sharded, a token's vector is on one device, and zeros are on the others."""

    def __init__(self, init: Init, config: TextConfig):
        self.weight = init.normal((config.vocab_size, config.hidden_size), ("vocab", "embed"))

    def __call__(self, tokens: Tokens, partition: Partition = SINGLE_DEVICE) -> Hidden:
        words = self.weight.shape[0]
        local = tokens - words * partition.shard_index("vocab")
        x = self.weight[...][jnp.clip(local, 0, words - 1)]
        return jnp.where(((local >= 0) & (local < words))[:, :, None], x, 0)


class Decoder(nnx.Module):
    """Embeddings -> the hidden vectors after the final norm."""

    def __init__(self, init: Init, config: TextConfig):
        self.embed_tokens = Embedding(init, config)
        self.layers = nnx.List([Block(init, config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(init, config.hidden_size, config.rms_norm_eps)
        self.output_attn_res_norm, self.output_attn_res_proj = depth_attention(init, config)

    def last_norm(self, stream: ResidualStream) -> Stream:
        """Returns the vectors that the head takes, of the stream after the last layer."""
        depth = self.output_attn_res_norm, self.output_attn_res_proj
        return norm_stream(stream, self.norm, depth, ONE_DEVICE)[1]

    def __call__(
        self,
        x: Stream,
        context: Context,
        caches: tuple[LayerCache, ...] | None = None,
        layout: StreamLayout = ONE_DEVICE,
    ) -> tuple[Stream, tuple[LayerCache, ...] | None]:
        """Maps the stream x [b, t, d] of the tokens that `context` describes to the same shape, and returns each
        layer's cache with them in it."""
        x, after, _ = self.with_aux(x, context, caches, layout, ())
        return x, after

    def with_aux(
        self,
        x: Stream,
        context: Context,
        caches: tuple[LayerCache, ...] | None,
        layout: StreamLayout,
        aux_layers: tuple[int, ...],
    ) -> tuple[Stream, tuple[LayerCache, ...] | None, tuple[Stream, ...]]:
        """Maps the stream as a call does, and also returns the outputs of `aux_layers`, counted from 0, which a draft
        head takes. With attention residuals an output is the sum since the last snapshot."""
        stream, outputs = ResidualStream(x), {}
        before = [None] * len(self.layers) if caches is None else caches
        after: list[LayerCache | None] = []
        for number, (block, cache) in enumerate(zip(self.layers, before, strict=True)):
            stream, with_tokens = gather_weights(block, layout.partition)(stream, context, cache, layout)
            after.append(with_tokens)
            if number in aux_layers:
                stream = stream.settled()
                outputs[number] = stream.prefix
        kept = None if caches is None else tuple(cache for cache in after if cache is not None)
        return self.last_norm(stream), kept, tuple(outputs[number] for number in aux_layers)

    def with_statistics(
        self, x: Stream, context: Context, layout: StreamLayout = ONE_DEVICE, recompute: bool = True
    ) -> tuple[Stream, tuple[LayerStatistics, ...]]:
        """Maps the stream without a cache for training, and returns each layer's statistics.

        A gradient keeps the stream before each layer, and computes the layer again, its gathered weights too; where it
        is not to `recompute`, it keeps all that it needs.
        """
        stream, found = ResidualStream(x), []
        for block in self.layers:
            stream, statistics = _run(block, stream, context, layout, recompute)
            found.append(statistics)
        return self.last_norm(stream), tuple(found)


def _run(
    block: Block, x: ResidualStream, context: Context, layout: StreamLayout, recompute: bool
) -> tuple[ResidualStream, LayerStatistics]:
    graph, weights = nnx.split(block)

    def run(weights: nnx.State, x: ResidualStream, context: Context) -> tuple[ResidualStream, LayerStatistics]:
        return gather_weights(nnx.merge(graph, weights), layout.partition).with_statistics(x, context, layout)

    return (jax.checkpoint(run) if recompute else run)(weights, x, context)
