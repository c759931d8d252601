"""The next-token loss of packed rows, with logits at trained positions only, and what the layers saw meanwhile."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kimi_jax.axes import Array, Float32, Int32, MediaTokens
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.param import gather_weights, weight_specs
from kimi_jax.model.statistics import Statistics
from kimi_jax.training.rows import Rows
from sharding import SINGLE_DEVICE, Partition


class Losses(NamedTuple):
    """Sums over the trained positions of a batch, to be divided by the number of those of the global batch.

    loss: of the negative log-likelihoods; correct: of the positions where the label has the largest logit.
    """

    loss: Float32[Array, ""]
    correct: Int32[Array, ""]


def sum_losses(
    model: Kimi, rows: Rows, partition: Partition = SINGLE_DEVICE, *, recompute: bool = True
) -> tuple[Losses, Statistics]:
    """Computes the loss of the rows, sum of logsumexp(logits) - logits[label] over the trained positions.

    `partition` and `recompute` are those of `label_logits`.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    logits, statistics = label_logits(model, rows, partition, recompute=recompute)
    trained = rows.columns >= 0
    # (A sum over comparisons: where words are sharded, a gather and its gradient's scatter would travel.)
    is_label = jnp.maximum(rows.labels, 0)[:, :, None] == jnp.arange(logits.shape[-1])
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    losses = jnp.where(trained, jax.nn.logsumexp(logits, axis=-1) - of_label, 0)
    correct = trained & (of_label >= jax.lax.stop_gradient(logits).max(axis=-1))
    return Losses(jnp.sum(losses), jnp.sum(correct, dtype=jnp.int32)), statistics


def label_logits(
    model: Kimi, rows: Rows, partition: Partition = SINGLE_DEVICE, *, recompute: bool = True
) -> tuple[Float32[Array, "b n w"], Statistics]:
    """Computes float32 logits [b, n, vocab_size] at `rows.columns`, meaningless where a column is -1.

    `partition` is that of the weights. On a mesh the result's words are sharded as those of `lm_head`. A gradient
    recomputes each layer, and the vision tower as a whole; without `recompute` it keeps what it needs, which is faster
    where there is memory for it.
    """
    text, rows = model.config.text, jax.tree.map(jnp.asarray, rows)
    layout = model.stream_layout(partition, *rows.tokens.shape)
    if "kda" in text.layer_kinds:
        # The state of a packed row does not pass from one device to the next
        layout = dataclasses.replace(layout, token_axes=())
    graph, weights = nnx.split(model)

    def on_device(weights: Any, rows: Rows) -> tuple[Array, Statistics]:
        local = nnx.merge(graph, weights)
        media, index = None, rows.media_index
        if index is not None:
            media = encode_rows(local, rows, partition, recompute)
            first = jnp.arange(len(index))[:, None] * (len(media) // len(index))
            index = jnp.where(index >= 0, index + first, -1)
        x = local.embed(rows.tokens, index, media, layout)
        x, layers = local.model.with_statistics(x, rows.context, layout, recompute)
        columns = jnp.maximum(rows.columns, 0)[:, :, None]
        hidden = jnp.take_along_axis(layout.gather_rows(layout.take_local(x)), columns, axis=1)
        heads = text.num_attention_heads // partition.num_shards("heads")
        return local.logits(hidden, partition), Statistics.stack(layers, text.n_routed_experts, heads)

    in_specs = (weight_specs(weights, partition), jax.tree.map(lambda _: layout.row_spec(), rows))
    out_specs = (layout.row_spec(None, "vocab"), Statistics.specs(layout))
    return partition.shard_map(on_device, in_specs, out_specs)(weights, rows)


def encode_rows(model: Kimi, rows: Rows, partition: Partition, recompute: bool = True) -> MediaTokens:
    """Computes the embeddings of the rows' media, [b * m, d], each row's one after another."""
    assert model.vision_tower is not None and model.mm_projector is not None
    graph, weights = nnx.split(nnx.List([model.vision_tower, model.mm_projector]))

    def encode(weights: Any, patches: Array, patch_layout: Any) -> Array:
        tower, projector = gather_weights(nnx.merge(graph, weights), partition)
        return jax.vmap(lambda row, where: projector(tower(row, where)))(patches, patch_layout)

    run = jax.checkpoint(encode) if recompute else encode
    media = run(weights, rows.patches.astype(model.dtype), rows.patch_layout)
    return media.reshape(-1, media.shape[-1])
