"""Where the residual stream lies, and how a block's partial results get back to it.

*Whole*, for a decode step: every device has all rows, so that tokens need not travel to experts; a device's token
mixers treat their rows. *Split*, for prefill and large batches: a device has its rows' tokens, or where a prompt is
split over `sequence`, its part of them.
"""

import dataclasses
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sharding.collectives import index, over, size, split, total
from sharding.experts import worth_exchanging
from sharding.mesh import AXES
from sharding.rules import PREFILL

# A prompt's part on a device of `sequence` has at least these, and so all that a short convolution reaches back to.
FEWEST_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Residual:
    """`batch`: the mesh axes over which rows are split; `tokens`: those over which the stream's tokens are; `whole`:
    the stream has all rows everywhere, and only what mixers see is split; `exchange`: tokens travel to experts."""

    batch: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    whole: bool = False
    exchange: bool = False

    @classmethod
    def of(cls, rows: int, tokens: int, width: int = 0, chosen: int = 0) -> "Residual":
        """For a call with this many rows and tokens a row on the mesh in use. What does not divide is not split.

        `width` of the hidden vectors and `chosen` experts of a token decide whether tokens travel.
        """
        shape = dict.fromkeys(AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)
        batch = ("data",) if shape["data"] > 1 and rows % shape["data"] == 0 else ()
        parts = shape["sequence"]
        split = ("sequence",) if parts > 1 and tokens % parts == 0 and tokens >= parts * FEWEST_TOKENS else ()
        alike = prod(count for name, count in shape.items() if name not in batch + split)
        exchange = chosen > 0 and worth_exchanging(rows * tokens, width, chosen, prod(shape.values()), alike)
        return cls(batch, split, whole=tokens == 1 and not exchange, exchange=exchange)

    def mine(self, x: Array) -> Array:
        """Of the stream [rows, t, ...], this device's rows with all their tokens."""
        if self.whole and self.batch:
            rows = x.shape[0] // size(self.batch)
            return lax.dynamic_slice_in_dim(x, index(self.batch) * rows, rows)
        return lax.all_gather(x, self.tokens, axis=1, tiled=True) if self.tokens else x

    def rows(self, *axes: str | None) -> PartitionSpec:
        """How an array lies whose first axis are the batch's rows, and its last ones logical `axes`."""
        mesh = jax.sharding.get_abstract_mesh()
        rest = [tuple(name for name in PREFILL.get(axis or "", ()) if mesh.shape.get(name, 1) > 1) for axis in axes]
        return PartitionSpec(*(names or None for names in (self.batch, *rest)))

    def at(self, x: Float[Array, "rows t d"], number: Int32[Array, "b"]) -> Float[Array, "b d"]:
        """Of each of this device's rows, the token with this number."""
        x = self.mine(x) if self.whole else x
        here = number - index(self.tokens) * x.shape[1]
        found = jnp.take_along_axis(x, jnp.clip(here, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
        return total(jnp.where(((here >= 0) & (here < x.shape[1]))[:, None], found, 0), self.tokens)

    def my_tokens(self, x: Array) -> Array:
        """Of this device's rows [b, t, ...], the tokens that the stream has here."""
        if not self.tokens:
            return x
        count = x.shape[1] // size(self.tokens)
        return lax.dynamic_slice_in_dim(x, index(self.tokens) * count, count, axis=1)

    def summed(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        """What the parts of logical axis `axis` add up to for this device's rows, laid into the stream."""
        names = over(axis)
        if self.whole and self.batch:
            if not names:
                return lax.all_gather(y.astype(dtype), self.batch, axis=0, tiled=True)
            here = jnp.arange(size(self.batch)) == index(self.batch)
            placed = jnp.where(here[:, None, None, None], y, 0).reshape(-1, *y.shape[1:])
            return total(placed, self.batch + names).astype(dtype)
        if self.tokens:
            y = lax.psum_scatter(y, self.tokens, scatter_dimension=1, tiled=True)
            names = tuple(name for name in names if name not in self.tokens)
        return total(y, names).astype(dtype)

    def summed_in_place(self, y: Float[Array, "b t d"], axis: str, dtype: jnp.dtype) -> Float[Array, "rows tokens d"]:
        """The same of parts that are of the stream's own tokens, not of all of the rows'."""
        return self.summed(y, axis, dtype) if self.whole else total(y, over(axis)).astype(dtype)

    def alone(self, x: Array) -> Array:
        """Of the stream, a part of the tokens that this device alone has, [n, d]; zeros fill the last parts up."""
        names = tuple(name for name in split(AXES) if name not in self.batch + self.tokens)
        x = x.reshape(-1, x.shape[-1])
        count = -(-len(x) // size(names))
        x = jnp.pad(x, ((0, count * size(names) - len(x)), (0, 0)))
        return lax.dynamic_slice_in_dim(x, index(names) * count, count)

    def rejoined(self, y: Array, like: Array) -> Array:
        """The stream out of the parts of `alone`."""
        names = tuple(name for name in split(AXES) if name not in self.batch + self.tokens)
        y = lax.all_gather(y.astype(like.dtype), names, axis=0, tiled=True) if names else y.astype(like.dtype)
        return y[: like.shape[0] * like.shape[1]].reshape(like.shape)

    def everyone(self, x: Array) -> Array:
        """The stream's tokens of all devices, [t, d]."""
        if not self.whole:
            x = lax.all_gather(x, self.batch, axis=0, tiled=True) if self.batch else x
            x = self.mine(x)
        return x.reshape(-1, x.shape[-1])

    def back(self, y: Float32[Array, "all d"], like: Array) -> Array:
        """The sum over all devices of their parts for the tokens of all, laid into the stream as `like` lies."""
        names = split(AXES)
        if not self.whole:
            rows = like.shape[0] * size(self.batch)
            y = y.reshape(rows, -1, y.shape[-1])
            for axis, group in ((0, self.batch), (1, self.tokens)):
                if group:
                    y = lax.psum_scatter(y, group, scatter_dimension=axis, tiled=True)
            names = tuple(name for name in names if name not in self.batch + self.tokens)
        return total(y, names).reshape(like.shape).astype(like.dtype)


ALONE = Residual()
