"""Plain floating-point weights."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.checks import checks_arguments
from pallas_kernels.formats.format import Part, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Weight):
    """`weight` [..., out, in] in any floating dtype, as Linears are published."""

    weight: Any

    parts = stored = (Part("weight"),)
    trained = True

    @classmethod
    def from_dense(cls, weight: Float[Array, "*batch out in"]) -> "Weight":
        """Returns the weight as it is."""
        return cls(weight)

    @property
    def dtype(self) -> Any:
        """The array's dtype."""
        return self.weight.dtype

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
        """Returns the array, in `dtype` where one is given."""
        return self.weight if dtype is None else self.weight.astype(dtype)


@checks_arguments
def as_weight(op: str, name: str, weight: Weight | ArrayLike) -> Weight:
    """Returns a weight as it is, and an array as a `Dense` weight.

    Raises:
      ValueError: `weight` is neither.
    """
    if isinstance(weight, Weight):
        return jax.tree.map(jnp.asarray, weight)
    if not hasattr(weight, "shape"):
        raise ValueError(f"{op}: {name} is a {type(weight).__name__}, expected an array or a Weight")
    return Dense(jnp.asarray(weight))
