"""Numbers that a forward pass counts on its way, for QK-Clip and the router's bias; no gradient flows through them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from kimi_jax.axes import Array, Float32, Int32, Valid
from sharding import REPLICATED, StreamLayout, all_reduce


class LayerStatistics(NamedTuple):
    """A layer's counts int32 [e], None without routed experts, and largest logits float32 [h], None without MLA."""

    expert_counts: Int32[Array, "e"] | None = None
    max_logits: Float32[Array, "h"] | None = None


class Statistics(NamedTuple):
    """Statistics of a call, over all its rows on all devices.

    expert_counts: int32 [layers, e], for each layer with routed experts the tokens that chose each; padding is not
        counted.
    max_logits: float32 [layers, h], for each MLA layer the largest score of each head before the softmax, its scale
        included, over all visible pairs; -inf where there is none.
    """

    expert_counts: Int32[Array, "layers e"]
    max_logits: Float32[Array, "layers h"]

    @classmethod
    def stack(cls, layers: Sequence[LayerStatistics], experts: int, heads: int) -> "Statistics":
        """Stacks the statistics of layers with `experts` experts, and `heads` heads on this device."""
        counts = [layer.expert_counts for layer in layers if layer.expert_counts is not None]
        logits = [layer.max_logits for layer in layers if layer.max_logits is not None]
        return cls(
            jnp.stack(counts) if counts else jnp.zeros((0, experts), jnp.int32),
            jnp.stack(logits) if logits else jnp.zeros((0, heads), jnp.float32),
        )

    @classmethod
    def specs(cls, layout: StreamLayout) -> "Statistics":
        """Returns the PartitionSpecs of what `stack` returns on each device."""
        heads = PartitionSpec(None, layout.partition.axis_names("heads") or None)
        return cls(REPLICATED, heads)  # type: ignore[arg-type]


def count_choices(
    chosen: Int32[Array, "tokens j"], valid: Valid, experts: int, layout: StreamLayout
) -> Int32[Array, "e"]:
    """Counts the tokens of all devices that chose each expert, given the choices that `block.mix_experts` makes here.

    `valid` marks the tokens of this device's stream [rows, tokens] that are no padding.
    """
    unique = layout.dispatches  # else every device routes all tokens
    real = (layout.scatter_unique if unique else layout.gather_all)(valid[:, :, None].astype(jnp.int32))
    # (A sum over comparisons: adding one by one would scatter.)
    chose = jnp.where(real[:, :, None] > 0, chosen[:, :, None] == jnp.arange(experts), False)
    counts = jnp.sum(chose, axis=(0, 1), dtype=jnp.int32)
    return all_reduce(counts, layout.partition.mesh_axes) if unique else counts


def largest_logits(top: Float32[Array, "b h"], layout: StreamLayout) -> Float32[Array, "h"]:
    """Returns each head's largest logit over the rows of all devices, given those of this device's rows."""
    largest = lax.stop_gradient(jnp.max(top, axis=0))
    return lax.pmax(largest, layout.row_axes) if layout.row_axes else largest
