"""A whole Kimi: the language model, and where config.json has one, the vision tower and its projector.

Attribute names are those of the published tensors (without the `language_model.` prefix), so that a path in this tree
is a name in a checkpoint.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from numpy.typing import ArrayLike

from kimi_jax.axes import Float32, Hidden, Int32, Logits, MediaTokens, Stream, Tokens
from kimi_jax.config import KimiConfig
from kimi_jax.model.context import Context, LayerCache
from kimi_jax.model.decoder import Decoder
from kimi_jax.model.param import Init, Linear, gather_weights, placed, weight_specs
from kimi_jax.model.splice import Media, media_index, tokens_per_item
from kimi_jax.model.token_ids import token_ids
from kimi_jax.model.vision import Projector, VisionTower
from kimi_jax.model.vision_layout import PatchLayout, lay_out_patches
from sharding import REPLICATED, SERVE, SINGLE_DEVICE, Partition, Rules, StreamLayout, array_mesh, choose_layout


class Kimi(nnx.Module):
    """`Kimi(config, rngs=nnx.Rngs(0))` draws random weights; `checkpoints.load` fills published ones in."""

    def __init__(self, config: KimiConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike | None = None):
        """Draws random weights. `dtype` is that of parameters and activations; None takes config.json's."""
        self.config = config
        init = Init(rngs.params(), jnp.dtype(dtype or config.text.dtype), config.text.initializer_range)
        self.model = Decoder(init, config.text)
        self.lm_head = Linear(init, config.text.vocab_size, config.text.hidden_size, ("vocab", "embed"))
        self.vision_tower = None if config.vision is None else VisionTower(init, config.vision)
        self.mm_projector = None if config.vision is None else Projector(init, config.vision)

    @property
    def dtype(self) -> jnp.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """Returns the mesh over which the weights are sharded, None on a single device."""
        return self.partition.mesh

    @property
    def partition(self) -> Partition:
        """Returns the partition of the weights, if they are sharded for serving."""
        return Partition(array_mesh(self.model.embed_tokens.weight.get_value()))

    def __call__(self, tokens: ArrayLike, media: Media | None = None, partition: Partition | None = None) -> Logits:
        """Computes logits at every position: token ids [b, t], right-padded, -> float32 [b, t, vocab_size].

        Media placeholders in `tokens` are already expanded, one per media token, in the order of `media`'s items.
        `partition` is that of the weights, if not the one for serving; under an outer `jit` on a mesh it has to be
        given, and no media. Raises ValueError where media do not match the placeholders, and for tokens that are no
        integers of the vocabulary.
        """
        partition = self.partition if partition is None else partition
        if media is None and isinstance(tokens, jax.core.Tracer):
            return self.forward(tokens, partition=partition)
        ids = token_ids(tokens, self.config.text.vocab_size)
        index = media_index(ids, media, self.config)
        embeds = None if media is None else self.encode_media_padded(media, partition)
        where = None if index is None else jnp.asarray(index)
        return _logits(self, jnp.asarray(ids), where, embeds, partition)

    def encode_media(self, media: Media) -> MediaTokens:
        """Computes the embeddings of the media's tokens, [tokens, hidden_size], items one after another."""
        count = int(tokens_per_item(media.grids, self.config).sum())
        return self.encode_media_padded(media)[:count]

    def encode_media_padded(self, media: Media, partition: Partition | None = None) -> MediaTokens:
        """Computes `encode_media`'s embeddings, followed by padding: few shapes occur, so that few programs are
        compiled.

        `partition` is that of the weights, if not the one for serving.
        """
        partition = self.partition if partition is None else partition
        tokens_per_item(media.grids, self.config)
        assert self.config.vision is not None
        where = lay_out_patches(media.grids, self.config.vision)
        padding = [(0, len(where.segment) - len(media.patches))] + [(0, 0)] * 3
        patches = np.pad(np.asarray(media.patches, np.float32), padding)
        return _encode(self, jnp.asarray(patches, self.dtype), jax.tree.map(jnp.asarray, where), partition)

    def embed(
        self,
        tokens: Tokens,
        index: Int32[jax.Array, "b t"] | None,
        media_tokens: MediaTokens | None,
        layout: StreamLayout,
    ) -> Stream:
        """Makes the residual stream of word embeddings, and of `media_tokens[index]` where `index` is not -1."""
        partition = layout.partition
        x = gather_weights(self.model.embed_tokens, partition)(tokens, partition)
        if index is not None and media_tokens is not None:
            chosen = media_tokens[jnp.maximum(index, 0)].astype(x.dtype)
            here = jnp.where(partition.shard_index("vocab") == 0, chosen, 0)
            x = jnp.where((index >= 0)[:, :, None], here, x)
        return layout.reduce_rows(x, "vocab", x.dtype)

    def logits(self, x: jax.Array, partition: Partition) -> jax.Array:
        """Maps hidden vectors [..., d] to float32 [..., words], the logits of this device's words."""
        return gather_weights(self.lm_head, partition)(x, dtype=jnp.float32)

    def forward(
        self,
        tokens: Tokens,
        index: Int32[jax.Array, "b t"] | None = None,
        media_tokens: MediaTokens | None = None,
        partition: Partition = SINGLE_DEVICE,
    ) -> Logits:
        """Computes logits of whole prompts at every position, without a cache."""
        layout = self.stream_layout(partition, *tokens.shape)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        graph, params = nnx.split(self)

        def on_device(params: Any, tokens: Any, positions: Any, index: Any, media_tokens: Any) -> jax.Array:
            model = nnx.merge(graph, params)
            x, _ = model.model(model.embed(tokens, index, media_tokens, layout), Context(positions), layout=layout)
            return model.logits(layout.gather_rows(layout.take_local(x)), partition)

        rows = layout.row_spec()
        in_specs = (weight_specs(params, partition), rows, rows, rows, REPLICATED)
        run = partition.shard_map(on_device, in_specs, layout.row_spec(None, "vocab"))
        return run(params, tokens, positions, index, media_tokens)

    def stream_layout(
        self, partition: Partition, rows: int, tokens: int, *, decodes: bool | None = None
    ) -> StreamLayout:
        """Chooses the layout of the residual stream of a call of `rows` rows with `tokens` tokens each. `decodes` is as
        for `choose_layout`."""
        text = self.config.text
        chosen = text.num_experts_per_tok if text.n_routed_experts else 0
        return choose_layout(partition, rows, tokens, text.expert_width, chosen, decodes)

    def extend(
        self,
        caches: tuple[LayerCache, ...],
        tokens: Tokens,
        context: Context,
        index: Int32[jax.Array, "b t"] | None,
        media_tokens: MediaTokens | None,
        layout: StreamLayout,
    ) -> tuple[Float32[jax.Array, "... words"], tuple[LayerCache, ...]]:
        """Continues from the caches with the tokens that `context` describes; all arrays are this device's shards.

        (`runtime.program` calls it on every device of a mesh.)
        Returns the logits after each sequence's last token (meaningless where it has none), float32 [sequences, words],
        in a verification after each token, [b, t, words]; and the caches with the tokens in them.
        """
        logits, after, _ = self.extend_with_aux(caches, tokens, context, index, media_tokens, layout, ())
        return logits, after

    def extend_with_aux(
        self,
        caches: tuple[LayerCache, ...],
        tokens: Tokens,
        context: Context,
        index: Int32[jax.Array, "b t"] | None,
        media_tokens: MediaTokens | None,
        layout: StreamLayout,
        aux_layers: tuple[int, ...],
    ) -> tuple[Float32[jax.Array, "... words"], tuple[LayerCache, ...], Hidden | None]:
        """Continues as `extend` does, and also returns the outputs of `aux_layers`, counted from 0, of all tokens of
        this device's rows: [b, t, n * d], side by side in the order of `aux_layers`, which a draft head takes; None
        where there are no `aux_layers`."""
        embeds = self.embed(tokens, index, media_tokens, layout)
        x, after, outputs = self.model.with_aux(embeds, context, caches, layout, aux_layers)
        assert after is not None
        aux = layout.gather_rows(layout.take_local(jnp.concatenate(outputs, axis=-1))) if outputs else None
        if context.phase == "verify":
            return self.logits(layout.gather_rows(layout.take_local(x)), layout.partition), after, aux
        if context.segments is None:
            return self.logits(layout.take_token(x, context.last()), layout.partition), after, aux
        rows, columns = len(tokens), context.last().reshape(len(tokens), -1)
        last = jnp.take_along_axis(layout.gather_rows(layout.take_local(x)), columns[:, :, None], axis=1)
        return self.logits(last.reshape(rows * columns.shape[1], -1), layout.partition), after, aux


@functools.partial(jax.jit, static_argnums=4)
def _logits(
    model: Kimi, tokens: jax.Array, index: jax.Array | None, media_tokens: jax.Array | None, partition: Partition
) -> jax.Array:
    return model.forward(tokens, index, media_tokens, partition)


@functools.partial(jax.jit, static_argnums=3)
def _encode(model: Kimi, patches: jax.Array, where: PatchLayout, partition: Partition) -> jax.Array:
    assert model.vision_tower is not None and model.mm_projector is not None
    graph, weights = nnx.split(nnx.List([model.vision_tower, model.mm_projector]))

    def on_device(weights: Any, patches: jax.Array, where: PatchLayout) -> jax.Array:
        tower, projector = gather_weights(nnx.merge(graph, weights), partition)
        return projector(tower(patches, where))

    in_specs = (weight_specs(weights, partition), REPLICATED, REPLICATED)
    return partition.shard_map(on_device, in_specs, REPLICATED)(weights, patches, where)


def abstract(
    config: KimiConfig,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    rules: Rules = SERVE,
) -> Kimi:
    """Makes the model's tree with shapes and dtypes for values, sharded over `mesh` by `rules` where a mesh is given.

    Nothing is allocated, whatever the size.
    """
    model = nnx.eval_shape(lambda: Kimi(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return model if mesh is None else placed(model, mesh, rules)


def check_heads(config: KimiConfig, partition: Partition) -> None:
    """Raises ValueError where the mesh does not divide the heads, though it may divide a matrix of all of them."""
    partition.spec(("heads",), (config.text.num_attention_heads,))
    if config.text.linear_attn is not None:
        partition.spec(("kda_heads",), (config.text.linear_attn.num_heads,))
