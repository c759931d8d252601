"""Weights that are trained in floating point and read as INT4 will round them: quantisation-aware training.

The numbers are those of `int4_codec`, bit for bit, and gradients pass straight through: since amax has the code 7,
nothing is cut off that a mask would have to hide. A group of 32 inputs is rounded for itself, so that shards of the
inputs in multiples of 32 are rounded as the whole matrix is.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.checks import check_dtype, checks_arguments
from pallas_kernels.formats import int4_codec
from pallas_kernels.formats.dense import Dense
from pallas_kernels.formats.format import Part, Weight
from pallas_kernels.formats.straight_through import straight_through


@straight_through
@jax.jit  # one program instead of a dozen small ones for each shape
def _round(weight: Array) -> Array:
    return int4_codec.dequantize(*int4_codec.quantize(weight), weight.dtype)


@checks_arguments
def fake_quantize_int4(weight: Float[Array, "*batch out in"]) -> Float[Array, "*batch out in"]:
    """Rounds weights [..., out, in] to the numbers that published INT4 codes and scales give; same shape and dtype.

    The derivative is the identity. Numbers that it returns are a fixed point.

    Raises:
      ValueError: weights are not floating point, or `in` is no multiple of 32.
    """
    check_dtype("fake_quantize_int4", "weight", weight, jnp.floating)
    shape = jnp.shape(weight)
    if len(shape) < 2 or shape[-1] % int4_codec.GROUP_SIZE:
        raise ValueError(
            f"fake_quantize_int4: weight has shape {shape}, "
            f"expected [..., out, in] with in a multiple of {int4_codec.GROUP_SIZE}"
        )
    return _round(jnp.asarray(weight))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeInt4(Weight):
    """`weight` [..., out, in] in any floating dtype, of which ops read the numbers that INT4 will have."""

    weight: Any

    parts = stored = (Part("weight"),)
    trained = True

    @classmethod
    def from_dense(cls, weight: Float[Array, "*batch out in"]) -> "Weight":
        """Returns the weight unrounded."""
        return cls(weight)

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        return self.weight.dtype

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
        """Returns the numbers of `fake_quantize_int4`, in `dtype` where one is given."""
        rounded = fake_quantize_int4(self.weight)
        return rounded if dtype is None else rounded.astype(dtype)

    def operand(self, dtype: DTypeLike) -> "Weight":
        """Returns the rounded numbers as a `Dense` weight, through which gradients reach the unrounded ones."""
        return Dense(self.dequantize())
