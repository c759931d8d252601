"""The protocol of weight formats: arrays in the kernels' layout, their published tensors, the matrix they stand for.

A format is a frozen dataclass of arrays that is registered as a JAX pytree, so that `jit`, `vmap`, `scan` and
`shard_map` take it in place of an array. (Its fields are `Any`: JAX puts shapes, shardings and other things in them.)
A new one is a file of its own: it declares `parts` and `stored`, and defines `dequantize`, `from_dense`, and where the
published tensors are not the parts, `from_stored` and `to_stored`. Every op takes it then, by dequantising one matrix
at a time; a kernel of its own is one more backend of the op.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """An array of a weight [..., out, in]: a number for each block of `block` outputs x inputs.

    `name` is the dataclass's field, or the ending of a published name. A dtype of None is any floating one. A
    `transposed` part is [..., in, out]. A part that is not `sharded` is whole on every device along its last two axes,
    since its blocks may straddle shards; else blocks divide the weight.
    """

    name: str
    dtype: Any = None
    block: tuple[int, int] = (1, 1)
    transposed: bool = False
    sharded: bool = True

    @property
    def is_whole(self) -> bool:
        """Tells whether the part is the weight itself: a number for each of its own, in its order."""
        return self.block == (1, 1) and not self.transposed

    def shape(self, weight: Shape) -> Shape:
        """Returns the part's shape for a weight's, which may have one axis where a number stands for itself."""
        if self.is_whole:
            return weight
        *outer, out, in_ = weight
        counts = -(-out // self.block[0]), -(-in_ // self.block[1])
        return (*outer, *(counts[::-1] if self.transposed else counts))

    def axes(self, weight: Axes) -> Axes:
        """Returns the part's logical axes for a weight's."""
        last = weight[-2:] if self.sharded else (None, None)
        return (*weight[:-2], *(last[::-1] if self.transposed else last))

    def weight_shape(self, part: Shape) -> Shape:
        """Returns the shape of the weight whose part has this shape; blocks divide it."""
        if self.is_whole:
            return part
        *outer, out, in_ = (*part[:-2], *part[-2:][::-1]) if self.transposed else part
        return (*outer, out * self.block[0], in_ * self.block[1])

    def weight_axes(self, part: Axes) -> Axes:
        """Returns the logical axes of the weight whose part, a sharded one, has these."""
        return (*part[:-2], *part[-2:][::-1]) if self.transposed else part


class Weight:
    """A matrix [out, in], or a stack of them [..., out, in], in some format; ops take it in place of an array.

    `parts` are the dataclass's arrays, `stored` the published tensors, one for each part; the first has the codes, the
    others scales.
    """

    parts: ClassVar[tuple[Part, ...]]
    stored: ClassVar[tuple[Part, ...]]
    # The ending of a tensor that is published beside them and says the weight's shape [out, in]; None for no such.
    stored_shape: ClassVar[str | None] = None
    # Whether gradients reach the parts, so that they are a model's parameters; else they are constants.
    trained: ClassVar[bool] = False

    @classmethod
    def from_dense(cls, weight: Float[Array, "*batch out in"]) -> "Weight":
        """Quantises a weight."""
        raise NotImplementedError(f"{cls.__name__} has no quantiser")

    @classmethod
    def from_stored(cls, *tensors: Array) -> "Weight":
        """Returns the weight that is published as `tensors`, in the order of `stored`."""
        return cls(*tensors)

    def to_stored(self) -> tuple[Array, ...]:
        """Returns the published tensors, in the order of `stored`."""
        return self.arrays

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
        """Returns the numbers that the weight stands for, in `dtype`, or where it is None in `self.dtype`."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """The dtype that the numbers are read in."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays, in the order of `parts`."""
        return tuple(getattr(self, part.name) for part in self.parts)

    @property
    def shape(self) -> Shape:
        """The published shape, [..., out, in]."""
        return self.parts[0].weight_shape(jnp.shape(self.arrays[0]))

    @property
    def nbytes(self) -> int:
        """The bytes of all parts; a code of four bits is half a byte."""
        return sum(array_bytes(array.shape, array.dtype) for array in self.arrays)

    def at(self, index: Array | int) -> "Weight":
        """Takes the matrix at `index` of the leading axis."""
        # Arithmetic on the index, for negative ones, would keep XLA from fusing the slice.
        take = lambda array: lax.dynamic_index_in_dim(array, index, 0, False, allow_negative_indices=False)  # noqa: E731
        return jax.tree.map(take, self)

    def operand(self, dtype: DTypeLike) -> "Weight":
        """Returns the weight as ops multiply x of `dtype` by it, and through which gradients flow.

        A format whose parts are constants is its own operand. One that is trained (fake-quantised, say) gives the
        `Dense` weight of its numbers.
        """
        return self

    def check(self, op: str, name: str) -> None:
        """Raises ValueError where the parts' shapes do not fit each other, or a dtype is not the format's."""
        for part, array in zip(self.parts, self.arrays, strict=True):
            expected = part.shape(self.shape)
            if tuple(array.shape) != expected:
                raise ValueError(f"{op}: {name}'s {part.name} have shape {tuple(array.shape)}, expected {expected}")
            if part.dtype is not None and array.dtype != part.dtype:
                raise ValueError(f"{op}: {name}'s {part.name} are {array.dtype}, expected {jnp.dtype(part.dtype).name}")


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Returns an array's bytes in memory. (JAX's own `nbytes` counts a whole byte for a code of four bits.)"""
    bits = 4 if jnp.dtype(dtype).name in ("int4", "uint4") else 8 * jnp.dtype(dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * bits // 8
