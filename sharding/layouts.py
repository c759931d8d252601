"""Layouts of the residual stream over the mesh, and how a block's partial sums get back into it.

*Replicated*, for a decode step: every device has all rows, so that tokens need not travel to experts; a device's token
mixers treat the device's own rows. *Sharded*, for prefill and large batches: a device has the tokens of its own rows,
or where a prompt is sharded over `sequence`, its shard of them.
"""

import dataclasses
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sharding.collectives import active_axes, all_reduce, device_index, mesh_axes, num_devices
from sharding.expert_dispatch import dispatch_pays
from sharding.mesh import AXES
from sharding.rules import PREFILL

# A prompt's shard over `sequence` has at least so many tokens: more than a short convolution reaches back to.
FEWEST_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """Rows are sharded over the mesh axes `row_axes`, the stream's tokens over `token_axes`.

    With `replicated` the stream has all rows on every device, and only mixers see the device's own rows; with
    `dispatch` tokens travel to experts.
    """

    row_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    replicated: bool = False
    dispatch: bool = False

    @classmethod
    def choose(cls, rows: int, tokens: int, width: int = 0, chosen: int = 0) -> "StreamLayout":
        """Chooses a layout for a call of `rows` rows with `tokens` tokens each, on the mesh in use.

        An axis is sharded only where it divides. `width` of the hidden vectors and `chosen` experts of a token decide
        whether tokens travel to experts.
        """
        shape = dict.fromkeys(AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)
        row_axes = ("data",) if shape["data"] > 1 and rows % shape["data"] == 0 else ()
        shards = shape["sequence"]
        divides = shards > 1 and tokens % shards == 0 and tokens >= shards * FEWEST_TOKENS
        token_axes = ("sequence",) if divides else ()
        copies = prod(count for name, count in shape.items() if name not in row_axes + token_axes)
        dispatch = chosen > 0 and dispatch_pays(rows * tokens, width, chosen, prod(shape.values()), copies)
        return cls(row_axes, token_axes, replicated=tokens == 1 and not dispatch, dispatch=dispatch)

    def row_spec(self, *axes: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array [rows, ...] whose axes after the first are the logical `axes`."""
        mesh = jax.sharding.get_abstract_mesh()
        rest = [tuple(name for name in PREFILL.get(axis or "", ()) if mesh.shape.get(name, 1) > 1) for axis in axes]
        return PartitionSpec(*(names or None for names in (self.row_axes, *rest)))

    def gather_tokens(self, x: Array) -> Array:
        """Takes this device's rows with all their tokens [b, t, ...] out of the stream [rows, tokens, ...]."""
        if self.replicated and self.row_axes:
            rows = x.shape[0] // num_devices(self.row_axes)
            return lax.dynamic_slice_in_dim(x, device_index(self.row_axes) * rows, rows)
        return lax.all_gather(x, self.token_axes, axis=1, tiled=True) if self.token_axes else x

    def slice_tokens(self, x: Array) -> Array:
        """Takes the tokens that the stream has on this device out of this device's rows [b, t, ...]."""
        if not self.token_axes:
            return x
        count = x.shape[1] // num_devices(self.token_axes)
        return lax.dynamic_slice_in_dim(x, device_index(self.token_axes) * count, count, axis=1)

    def take_token(self, x: Float[Array, "rows t d"], number: Int32[Array, "b"]) -> Float[Array, "b d"]:
        """Takes token `number` of each of this device's rows out of the stream."""
        x = self.gather_tokens(x) if self.replicated else x
        local = number - device_index(self.token_axes) * x.shape[1]
        found = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
        return all_reduce(jnp.where(((local >= 0) & (local < x.shape[1]))[:, None], found, 0), self.token_axes)

    def reduce_rows(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        """Sums partial results for this device's rows over the shards of logical axis `axis`, into the stream."""
        names = mesh_axes(axis)
        if self.replicated and self.row_axes:
            if not names:
                return lax.all_gather(y.astype(dtype), self.row_axes, axis=0, tiled=True)
            is_local = jnp.arange(num_devices(self.row_axes)) == device_index(self.row_axes)
            placed = jnp.where(is_local[:, None, None, None], y, 0).reshape(-1, *y.shape[1:])
            return all_reduce(placed, self.row_axes + names).astype(dtype)
        if self.token_axes:
            y = lax.psum_scatter(y, self.token_axes, scatter_dimension=1, tiled=True)
            names = tuple(name for name in names if name not in self.token_axes)
        return all_reduce(y, names).astype(dtype)

    def reduce_tokens(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        """Sums partial results for the tokens that the stream has here over the shards of `axis`, into the stream.

        (In the replicated layout these are the device's rows.)
        """
        return self.reduce_rows(y, axis, dtype) if self.replicated else all_reduce(y, mesh_axes(axis)).astype(dtype)

    def scatter_unique(self, x: Array) -> Array:
        """Gives every token of the stream to one device: this one's are [n, d], with zeros where tokens run out."""
        names = tuple(name for name in active_axes(AXES) if name not in self.row_axes + self.token_axes)
        x = x.reshape(-1, x.shape[-1])
        count = -(-len(x) // num_devices(names))
        x = jnp.pad(x, ((0, count * num_devices(names) - len(x)), (0, 0)))
        return lax.dynamic_slice_in_dim(x, device_index(names) * count, count)

    def gather_unique(self, y: Array, like: Array) -> Array:
        """Gathers the tokens that `scatter_unique` gave to one device each, into a stream shaped like `like`."""
        names = tuple(name for name in active_axes(AXES) if name not in self.row_axes + self.token_axes)
        y = lax.all_gather(y.astype(like.dtype), names, axis=0, tiled=True) if names else y.astype(like.dtype)
        return y[: like.shape[0] * like.shape[1]].reshape(like.shape)

    def gather_all(self, x: Array) -> Array:
        """Gathers the stream's tokens of all devices, [all, d]."""
        if not self.replicated:
            x = lax.all_gather(x, self.row_axes, axis=0, tiled=True) if self.row_axes else x
            x = self.gather_tokens(x)
        return x.reshape(-1, x.shape[-1])

    def reduce_all(self, y: Float32[Array, "all d"], like: Array) -> Array:
        """Sums all devices' partial results for the tokens of `gather_all`, into a stream shaped like `like`."""
        names = active_axes(AXES)
        if not self.replicated:
            rows = like.shape[0] * num_devices(self.row_axes)
            y = y.reshape(rows, -1, y.shape[-1])
            for axis, group in ((0, self.row_axes), (1, self.token_axes)):
                if group:
                    y = lax.psum_scatter(y, group, scatter_dimension=axis, tiled=True)
            names = tuple(name for name in names if name not in self.row_axes + self.token_axes)
        return all_reduce(y, names).reshape(like.shape).astype(like.dtype)


SINGLE_DEVICE = StreamLayout()
