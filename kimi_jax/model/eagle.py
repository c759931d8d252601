"""Eagle3 draft heads (arXiv 2503.01840), 3.0 and 3.1: one layer that drafts tokens from a target's hidden vectors.

A head's token t joins two things: the hidden vector h_t, which `combine` makes of the outputs of some of the target's
layers at position t, and the embedding of the token after it. With these it drafts the token after that one:

    a = attention([input_layernorm(embedding), hidden_norm(h)])      r = h + a
    x = r + mlp(post_attention_layernorm(r))                         logits = lm_head(norm(x))

Where the target has not been yet, x takes the place of h_{t + 1} (in 3.1, norm(x)), and the drafted token that of the
token after it. Attribute names are those of the published tensors.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from kimi_jax.axes import Float, Float32, Hidden, Int32, Tokens
from kimi_jax.config import EagleConfig
from kimi_jax.model.context import Context, MLACache
from kimi_jax.model.decoder import Embedding
from kimi_jax.model.grouped_attention import GroupedAttention
from kimi_jax.model.mla import MLA
from kimi_jax.model.moe import MLP
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Init, Linear, placed
from sharding import Partition, StreamLayout, gather_columns


class EagleLayer(nnx.Module):
    """The layer of a head, whose attention takes embeddings and hidden vectors side by side."""

    def __init__(self, init: Init, config: EagleConfig):
        layer = config.layer
        hidden, eps = layer.hidden_size, layer.rms_norm_eps
        self.input_layernorm = RMSNorm(init, hidden, eps)
        self.hidden_norm = RMSNorm(init, hidden, eps)
        self.self_attn = (
            MLA(init, layer, 2 * hidden)
            if config.form == "mla"
            else GroupedAttention(init, layer, config.num_key_value_heads, 2 * hidden)
        )
        self.post_attention_layernorm = RMSNorm(init, hidden, eps)
        self.mlp = MLP(init, hidden, layer.intermediate_size)
        self.norm_before_residual = config.norm_before_residual

    def __call__(
        self, hidden: Hidden, embeds: Hidden, context: Context, cache: MLACache | None, layout: StreamLayout
    ) -> tuple[Hidden, MLACache | None]:
        """Maps hidden vectors and embeddings [b, t, d] to x of the formula, and returns the cache with the tokens of
        `context` in it."""
        normed = self.hidden_norm(hidden)
        x = jnp.concatenate([self.input_layernorm(embeds), normed], axis=-1)
        a, cache = self.self_attn(x, context, cache, layout.partition)
        r = (normed if self.norm_before_residual else hidden) + layout.reduce_rows(a, "heads", hidden.dtype)
        y = self.mlp(self.post_attention_layernorm(r))
        return r + layout.reduce_rows(y, "mlp", hidden.dtype), cache


class EagleHead(nnx.Module):
    """A head's weights. `checkpoints.load_head` fills published ones in."""

    def __init__(self, config: EagleConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike | None = None):
        """Draws random weights. `dtype` is that of parameters and activations; None takes config.json's."""
        self.config = config
        layer = config.layer
        init = Init(rngs.params(), jnp.dtype(dtype or layer.dtype), layer.initializer_range)
        hidden, eps, target = layer.hidden_size, layer.rms_norm_eps, config.target_hidden_size
        self.embed_tokens = nnx.data(Embedding(init, layer) if config.own_embedding else None)
        norms = [RMSNorm(init, target, eps) for _ in range(config.num_aux)] if config.fc_norm else None
        self.fc_norm = None if norms is None else nnx.List(norms)
        self.fc = Linear(init, hidden, config.num_aux * target, ("latent", "embed"))
        self.midlayer = EagleLayer(init, config)
        self.norm = RMSNorm(init, hidden, eps)
        self.lm_head = Linear(init, config.draft_vocab_size, hidden, ("vocab", "embed"))
        words = jnp.zeros(config.draft_vocab_size, jnp.int32)
        self.d2t = nnx.Variable(words, axes=(None,), full_shape=words.shape) if config.vocab_map else None

    @property
    def dtype(self) -> jnp.dtype:
        return self.fc.weight.dtype

    def combine(self, aux: Float[jax.Array, "b t n"], partition: Partition) -> Hidden:
        """Makes hidden vectors [b, t, d] of the target's, of `aux_layers` side by side, in the head's dtype."""
        aux = aux.astype(self.dtype)
        if self.fc_norm is not None:
            parts = jnp.split(aux, self.config.num_aux, axis=-1)
            aux = jnp.concatenate([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], axis=-1)
        (hidden,) = gather_columns([self.fc(aux)], [self.config.layer.hidden_size], partition.axis_names("latent"))
        return hidden

    def __call__(
        self, hidden: Hidden, tokens: Tokens, context: Context, cache: MLACache | None, layout: StreamLayout
    ) -> tuple[Hidden, Hidden, MLACache | None]:
        """Runs the layer on hidden vectors [b, t, d] and the tokens after them; arrays are this device's shards, and a
        row's tokens are on every device that has the row.

        Returns the vectors that the head's words are computed of, those for the next draft, and the cache with these
        tokens in it.
        """
        assert self.embed_tokens is not None
        partition = layout.partition
        embeds = layout.reduce_rows(self.embed_tokens(tokens, partition), "vocab", hidden.dtype)
        x, cache = self.midlayer(hidden, embeds, context, cache, layout)
        normed = self.norm(x)
        return normed, normed if self.config.norm_output else x, cache

    def logits(self, x: Float[jax.Array, "... d"]) -> Float32[jax.Array, "... words"]:
        """Maps vectors after the norm to the logits of this device's part of the words that it drafts."""
        return self.lm_head(x, dtype=jnp.float32)

    def target_ids(self, words: Int32[jax.Array, "..."]) -> Int32[jax.Array, "..."]:
        """Returns the target's ids of words that were drafted: `d2t` has the differences."""
        return words if self.d2t is None else words + self.d2t[...][words]


def abstract_head(
    config: EagleConfig, dtype: jax.typing.DTypeLike | None = None, mesh: Mesh | AbstractMesh | None = None
) -> EagleHead:
    """Makes the head's tree with shapes and dtypes for values, sharded over `mesh` where one is given; nothing is
    allocated."""
    head = nnx.eval_shape(lambda: EagleHead(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return head if mesh is None else placed(head, mesh)


def check_head(config: EagleConfig, partition: Partition) -> None:
    """Raises ValueError where the mesh does not divide the heads of keys and values, though it may divide a matrix of
    all of them, and where it splits a row of the Llama form's cache, whose shards are heads."""
    if config.form == "llama" and (devices := partition.num_shards("row_pages")) > 1:
        raise ValueError(f"draft head: in the Llama form it takes no mesh with a sequence axis, which is {devices}")
    shards, heads = partition.num_shards("heads"), config.num_key_value_heads
    if heads % shards:
        raise ValueError(f"draft head: {heads} heads of keys and values do not divide over {shards} devices")
