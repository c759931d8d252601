"""Layouts of the residual stream over the mesh: how mixers get their inputs out of it, and partial sums get back into
it.

A layout's methods are pairs. A mixer of one device's tokens works between `take_local` and `reduce_local`, one that
needs whole rows between `gather_rows` and `reduce_rows`, one that every device runs for all tokens between `gather_all`
and `reduce_all`, and one that treats every token on one device between `scatter_unique` and `gather_unique`.
"""

import dataclasses

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sharding.collectives import all_gather, all_reduce, device_index, num_devices, reduce_scatter, take_shard
from sharding.expert_dispatch import dispatch_pays
from sharding.partition import SINGLE_DEVICE, Partition

# A prompt's shard over `tokens` has at least so many: more than a short convolution reaches back to.
FEWEST_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """A device has the tokens of its own rows, or where prompts are sharded too, its shard of these tokens.

    Rows are sharded over the mesh axes `row_axes`, tokens of a row over `token_axes`. `dispatches`: tokens travel to
    their experts. This is the layout for prefill and large batches.
    """

    partition: Partition = SINGLE_DEVICE
    row_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    dispatches: bool = False

    def row_spec(self, *axes: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array [rows, ...] whose axes after the first are the logical `axes`."""
        return PartitionSpec(*(names or None for names in (self.row_axes, *map(self.partition.axis_names, axes))))

    def take_local(self, x: Array) -> Array:
        """Takes out of the stream what a mixer of this device's tokens treats, [b, tokens, ...]."""
        return x

    @property
    def local_part(self) -> tuple[int, Int32[Array, ""] | int]:
        """The number of parts into which `take_local` divides the stream's rows, and which of them it takes."""
        return 1, 0

    def reduce_local(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        """Sums partial results for `take_local`'s tokens over the shards of `axis`, into the stream."""
        return all_reduce(y, self.partition.axis_names(axis)).astype(dtype)

    def gather_rows(self, x: Array) -> Array:
        """Gathers all tokens of this device's rows [b, t, ...], given its own ones."""
        return all_gather(x, self.token_axes, axis=1)

    def reduce_rows(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        """Sums partial results for `gather_rows`' tokens over the shards of `axis`, into the stream."""
        names = tuple(name for name in self.partition.axis_names(axis) if name not in self.token_axes)
        return all_reduce(reduce_scatter(y, self.token_axes, axis=1), names).astype(dtype)

    def slice_rows(self, x: Array) -> Array:
        """Takes this device's tokens out of an array [b, t, ...] for all tokens of its rows."""
        return take_shard(x, self.token_axes, axis=1)

    def take_token(self, x: Float[Array, "rows t d"], number: Int32[Array, "b"]) -> Float[Array, "b d"]:
        """Takes token `number` of each of this device's rows out of the stream."""
        local = number - device_index(self.token_axes) * x.shape[1]
        found = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
        return all_reduce(jnp.where(((local >= 0) & (local < x.shape[1]))[:, None], found, 0), self.token_axes)

    def gather_all(self, x: Array) -> Array:
        """Gathers the stream's tokens of all devices, [all, d]."""
        x = all_gather(all_gather(x, self.row_axes, axis=0), self.token_axes, axis=1)
        return x.reshape(-1, x.shape[-1])

    def reduce_all(self, y: Float32[Array, "all width"], like: Array) -> Array:
        """Sums all devices' partial results for `gather_all`'s tokens, into a stream like `like`, but as wide as y."""
        y = y.reshape(like.shape[0] * num_devices(self.row_axes), -1, y.shape[-1])
        y = reduce_scatter(reduce_scatter(y, self.row_axes, axis=0), self.token_axes, axis=1)
        return all_reduce(y, self.copy_axes).reshape(*like.shape[:-1], -1).astype(like.dtype)

    def scatter_unique(self, x: Array) -> Array:
        """Gives every token of the stream to one device: this one's are [n, d], with zeros where tokens run out."""
        x = x.reshape(-1, x.shape[-1])
        padding = -len(x) % num_devices(self.copy_axes)
        return take_shard(jnp.pad(x, ((0, padding), (0, 0))), self.copy_axes, axis=0)

    def gather_unique(self, y: Array, like: Array) -> Array:
        """Gathers the tokens that `scatter_unique` gave to one device each, into a stream shaped like `like`."""
        y = all_gather(y.astype(like.dtype), self.copy_axes, axis=0)
        return y[: like.shape[0] * like.shape[1]].reshape(like.shape)

    @property
    def copy_axes(self) -> tuple[str, ...]:
        """Mesh axes along which all devices have the same part of the stream."""
        return tuple(name for name in self.partition.mesh_axes if name not in self.row_axes + self.token_axes)


class ReplicatedStream(StreamLayout):
    """Every device has all rows, so that tokens need not travel to experts; token mixers see the device's own rows.

    This is the layout for decode steps.
    """

    def take_local(self, x: Array) -> Array:
        return take_shard(x, self.row_axes, axis=0)

    @property
    def local_part(self) -> tuple[int, Int32[Array, ""] | int]:
        return num_devices(self.row_axes), device_index(self.row_axes)

    def reduce_local(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        names = self.partition.axis_names(axis)
        if not names:
            return all_gather(y.astype(dtype), self.row_axes, axis=0)
        if not self.row_axes:
            return all_reduce(y, names).astype(dtype)
        is_local = jnp.arange(num_devices(self.row_axes)) == device_index(self.row_axes)
        placed = jnp.where(is_local[:, None, None, None], y, 0).reshape(-1, *y.shape[1:])
        return all_reduce(placed, self.row_axes + names).astype(dtype)

    def gather_rows(self, x: Array) -> Array:
        return x

    def reduce_rows(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        return self.reduce_local(y, axis, dtype)

    def take_token(self, x: Float[Array, "rows t d"], number: Int32[Array, "b"]) -> Float[Array, "b d"]:
        return super().take_token(self.take_local(x), number)

    def gather_all(self, x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])

    def reduce_all(self, y: Float32[Array, "all width"], like: Array) -> Array:
        return all_reduce(y, self.partition.mesh_axes).reshape(*like.shape[:-1], -1).astype(like.dtype)


def choose_layout(
    partition: Partition, rows: int, tokens: int, width: int = 0, chosen: int = 0, decodes: bool | None = None
) -> StreamLayout:
    """Chooses the layout for a call of `rows` rows with `tokens` tokens each.

    An axis is sharded only where it divides. `width` of the hidden vectors and `chosen` experts of a token decide
    whether tokens travel to experts. `decodes` is True for a decode step, None where one token of each row says so.
    """
    row_axes = partition.axis_names("batch", rows)
    token_axes = partition.axis_names("tokens", tokens)
    if tokens < FEWEST_TOKENS * partition.num_devices(token_axes):
        token_axes = ()
    copies = partition.devices // partition.num_devices(row_axes + token_axes)
    dispatches = chosen > 0 and dispatch_pays(rows * tokens, width, chosen, partition.devices, copies)
    if (tokens == 1 if decodes is None else decodes) and not dispatches:
        return ReplicatedStream(partition, row_axes, token_axes)
    return StreamLayout(partition, row_axes, token_axes, dispatches)
