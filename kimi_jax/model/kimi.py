"""A whole Kimi: the language model, and where config.json has one, the vision tower and its projector.

Attribute names are those of the published tensors (without the `language_model.` prefix), so that a path in this tree
is a name in a checkpoint.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from numpy.typing import ArrayLike

from kimi_jax.axes import Float32, Int32, Logits, MediaTokens, Stream, Tokens
from kimi_jax.config import KimiConfig
from kimi_jax.model.context import Context, LayerCache
from kimi_jax.model.decoder import Decoder
from kimi_jax.model.param import Init, Linear, weight_specs
from kimi_jax.model.splice import Media, media_index, tokens_per_item
from kimi_jax.model.token_ids import token_ids
from kimi_jax.model.vision import Projector, VisionTower
from kimi_jax.model.vision_layout import Layout, layout
from sharding import REPLICATED, StreamLayout, array_mesh, shard_index, shard_over_mesh, use_mesh


class Kimi(nnx.Module):
    """`Kimi(config, rngs=nnx.Rngs(0))` draws random weights; `checkpoints.load` fills published ones in."""

    def __init__(self, config: KimiConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike | None = None):
        """`dtype` of parameters and activations; config.json's where it is None."""
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
    def mesh(self) -> AbstractMesh | None:
        """The mesh that the weights lie on; None on a single device."""
        return array_mesh(self.model.embed_tokens.weight.get_value())

    def __call__(self, tokens: ArrayLike, media: Media | None = None) -> Logits:
        """Logits at every position: token ids [b, t], right-padded, -> float32 [b, t, vocab_size].

        Media placeholders in `tokens` are already expanded, one per media token, in the order of `media`'s items.
        Raises ValueError where they do not match, and for tokens that are no integers of the vocabulary. Under an outer
        `jit` pass no media.
        """
        if media is None and isinstance(tokens, jax.core.Tracer):
            return self.forward(tokens)
        ids = token_ids(tokens, self.config.text.vocab_size)
        index = media_index(ids, media, self.config)
        embeds = None if media is None else self.encode_media_padded(media)
        where = None if index is None else jnp.asarray(index)
        return _logits(self, jnp.asarray(ids), where, embeds, self.mesh)

    def encode_media(self, media: Media) -> MediaTokens:
        """Embeddings of the media's tokens, [tokens, hidden_size], items one after another."""
        count = int(tokens_per_item(media.grids, self.config).sum())
        return self.encode_media_padded(media)[:count]

    def encode_media_padded(self, media: Media) -> MediaTokens:
        """The same, followed by padding: its shape takes few values, so that what uses it is compiled few times."""
        tokens_per_item(media.grids, self.config)
        assert self.config.vision is not None
        where = layout(media.grids, self.config.vision)
        padding = [(0, len(where.segment) - len(media.patches))] + [(0, 0)] * 3
        patches = np.pad(np.asarray(media.patches, np.float32), padding)
        return _encode(self, jnp.asarray(patches, self.dtype), jax.tree.map(jnp.asarray, where), self.mesh)

    def embed(
        self, tokens: Tokens, index: Int32[jax.Array, "b t"] | None, media: MediaTokens | None, layout: StreamLayout
    ) -> Stream:
        """Word embeddings, and `media[index]` where `index` is not -1, as the residual stream lies."""
        x = self.model.embed_tokens(tokens)
        if index is not None and media is not None:
            here = jnp.where(shard_index("vocab") == 0, media[jnp.maximum(index, 0)].astype(x.dtype), 0)
            x = jnp.where((index >= 0)[:, :, None], here, x)
        return layout.reduce_rows(x, "vocab", x.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden vectors [..., d] -> float32 [..., words], of the words held here."""
        return self.lm_head(x, dtype=jnp.float32)

    def forward(
        self, tokens: Tokens, index: Int32[jax.Array, "b t"] | None = None, media: MediaTokens | None = None
    ) -> Logits:
        """Logits of whole prompts at every position, with nothing carried; over the mesh in use."""
        layout = self.stream_layout(*tokens.shape)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

        def part(model: Kimi, tokens: Any, positions: Any, index: Any, media: Any) -> jax.Array:
            x, _ = model.model(model.embed(tokens, index, media, layout), Context(positions), layout=layout)
            return model.logits(layout.gather_tokens(x))

        rows = layout.row_spec()
        in_specs = (rows, rows, rows, REPLICATED)
        return self.on_mesh(part, (tokens, positions, index, media), in_specs, layout.row_spec(None, "vocab"))

    def stream_layout(self, rows: int, tokens: int) -> StreamLayout:
        """How the residual stream of such a call lies on the mesh in use."""
        text = self.config.text
        return StreamLayout.choose(
            rows, tokens, text.hidden_size, text.num_experts_per_tok if text.n_routed_experts else 0
        )

    def on_mesh(self, compute: Callable[..., Any], arguments: tuple[Any, ...], in_specs: Any, out_specs: Any) -> Any:
        """compute(model, *arguments) on every device of the mesh in use, with its part of the weights."""
        graph, params = nnx.split(self)

        def part(params: Any, *arguments: Any) -> Any:
            return compute(nnx.merge(graph, params), *arguments)

        return shard_over_mesh(part, (weight_specs(params), *in_specs), out_specs)(params, *arguments)

    def extend(
        self,
        caches: tuple[LayerCache, ...],
        tokens: Tokens,
        context: Context,
        index: Int32[jax.Array, "b t"] | None,
        media: MediaTokens | None,
        layout: StreamLayout,
    ) -> tuple[Float32[jax.Array, "sequences words"], tuple[LayerCache, ...]]:
        """Takes the tokens that `context` describes on from what the caches hold, on this device's part of everything
        (`runtime.program` calls it on every device of a mesh).

        Returns the logits after each sequence's last token (meaningless where it has none), float32 [sequences, words],
        and the caches with the tokens in them.
        """
        x, after = self.model(self.embed(tokens, index, media, layout), context, caches, layout)
        assert after is not None
        if context.segments is None:
            return self.logits(layout.take_token(x, context.last())), after
        rows, columns = len(tokens), context.last().reshape(len(tokens), -1)
        last = jnp.take_along_axis(layout.gather_tokens(x), columns[:, :, None], axis=1)
        return self.logits(last.reshape(rows * columns.shape[1], -1)), after


@nnx.jit(static_argnums=4)
def _logits(
    model: Kimi, tokens: jax.Array, index: jax.Array | None, media: jax.Array | None, mesh: AbstractMesh | None
) -> jax.Array:
    with use_mesh(mesh):
        return model.forward(tokens, index, media)


@nnx.jit(static_argnums=3)
def _encode(model: Kimi, patches: jax.Array, where: Layout, mesh: AbstractMesh | None) -> jax.Array:
    assert model.vision_tower is not None and model.mm_projector is not None
    graph, weights = nnx.split((model.vision_tower, model.mm_projector))

    def encode(weights: Any, media: tuple[jax.Array, Layout]) -> jax.Array:
        tower, projector = nnx.merge(graph, weights)
        return projector(tower(*media))

    with use_mesh(mesh):
        return shard_over_mesh(encode, (REPLICATED, REPLICATED), REPLICATED)(weights, (patches, where))


def abstract(config: KimiConfig, dtype: jax.typing.DTypeLike | None = None, mesh: Mesh | None = None) -> Kimi:
    """The model's tree with shapes and dtypes for values, on `mesh` where one is given: nothing is allocated, whatever
    the size."""
    model = nnx.eval_shape(lambda: Kimi(config, dtype=dtype, rngs=nnx.Rngs(0)))
    if mesh is None:
        return model
    graph, params = nnx.split(model)
    with use_mesh(mesh.abstract_mesh):
        lies = weight_specs(params)
    laid = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), params, lies
    )
    return nnx.merge(graph, laid)
