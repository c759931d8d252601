"""The residual stream between layers, and attention over its depth (Kimi K3, arXiv 2607.24653).

With attention residuals a layer reads no plain sum of all before it. Every `attn_res_block_size` layers the stream is
kept as a snapshot and the sum begins again; what a layer reads is an average of the snapshots and the sum since, by a
softmax over scores that each token computes for itself. Nothing of this is kept from one token to the next.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.axes import Stream
from kimi_jax.model.norm import RMSNorm
from kimi_jax.model.param import Linear
from pallas_kernels import add_norm
from sharding import StreamLayout


class ResidualStream(NamedTuple):
    """`prefix` plus `latest` is the sum that layers add to; `snapshots` are those kept so far, none in a plain model.

    `latest` is left to the next norm, which then takes one operation with the addition; None stands for nothing.
    """

    prefix: Stream
    snapshots: tuple[Stream, ...] = ()
    latest: Stream | None = None

    @property
    def total(self) -> Stream:
        """The sum that layers add to."""
        return self.prefix if self.latest is None else self.prefix + self.latest

    def add(self, y: Stream) -> "ResidualStream":
        """Returns the stream with y added to its sum."""
        return ResidualStream(self.total, self.snapshots, y)

    def restart(self, y: Stream) -> "ResidualStream":
        """Returns the stream whose sum is one snapshot more, and begins again from y."""
        return ResidualStream(y, (*self.snapshots, self.total))

    def settled(self) -> "ResidualStream":
        """Returns the stream with its whole sum in `prefix`."""
        return ResidualStream(self.total, self.snapshots)


def norm_stream(
    stream: ResidualStream, norm: RMSNorm, depth: tuple[RMSNorm | None, Linear | None], layout: StreamLayout
) -> tuple[ResidualStream, Stream]:
    """Returns the settled stream, and `norm` of what a layer reads of it, for the tokens of `layout.take_local`.

    `depth` is the norm and the projection of `read_stream`.
    """
    if stream.latest is None or (None not in depth and stream.snapshots):
        stream = stream.settled()
        return stream, norm(read_stream(jax.tree.map(layout.take_local, stream), *depth))
    (parts, number), (rows, *shape) = layout.local_part, stream.prefix.shape
    prefix, latest = (part.reshape(-1, shape[-1]) for part in (stream.prefix, stream.latest))
    local = rows // parts * math.prod(shape[:-1])
    total, normed = add_norm(prefix, latest, norm.weight[...], eps=norm.eps, rows=local, block=number)
    return ResidualStream(total.reshape(rows, *shape), stream.snapshots), normed.reshape(-1, *shape)


def read_stream(stream: ResidualStream, norm: RMSNorm | None, proj: Linear | None) -> Stream:
    """Returns softmax_i(proj(norm v_i)) * v_i, summed over the snapshots and the prefix v_i, in the stream's dtype.

    All is float32 in between. Without `norm` and `proj`, or without snapshots, this is the prefix. The stream has to be
    settled.
    """
    if norm is None or proj is None or not stream.snapshots:
        return stream.prefix
    sources = [source.astype(jnp.float32) for source in (*stream.snapshots, stream.prefix)]
    key = norm.weight[...].astype(jnp.float32) * proj.weight[0].astype(jnp.float32)
    scores = [
        jnp.sum(v * key, axis=-1, keepdims=True) * jax.lax.rsqrt(jnp.mean(v * v, axis=-1, keepdims=True) + norm.eps)
        for v in sources
    ]
    shares = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    mixed = sum(shares[..., i : i + 1] * v for i, v in enumerate(sources))
    return jnp.asarray(mixed).astype(stream.prefix.dtype)
