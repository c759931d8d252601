"""How a weight is made: its shape, logical axes and initialiser on one line, its dtype from the `Init` at hand."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from sharding import mesh_axes, tree_specs

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Init:
    """Makes parameters. `axes` are logical names that `sharding.rules` turns into mesh axes; None is never sharded."""

    key: jax.Array
    dtype: jnp.dtype
    std: float = 0.02
    drawn: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def next_key(self) -> jax.Array:
        """A key nobody else has. (A stream of `nnx.Rngs` gives the same, ten times slower under tracing.)"""
        return jax.random.fold_in(self.key, next(self.drawn))

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return self.param(_normal(self.next_key(), shape, self.dtype, self.std), axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return self.param(jnp.ones(shape, self.dtype), axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return self.param(jnp.zeros(shape, self.dtype), axes)

    def param(self, value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
        if len(axes) != value.ndim:
            raise ValueError(f"{len(axes)} axes {axes} for a parameter of shape {value.shape}")
        return nnx.Param(value, axes=axes)


def weight_specs(params: Any) -> Any:
    """The PartitionSpec of every parameter, on the mesh in use."""

    def of(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(tree_specs(variable.get_value(), variable.get_metadata()["axes"]))

    return jax.tree.map(of, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def reshard_columns(module: Module, axis: str, like: str) -> Module:
    """The module with logical axis `axis` of its weights split as `like` is, gathered over the mesh's other axes."""
    graph, params = nnx.split(module)
    names = tuple(name for name in mesh_axes(axis) if name not in mesh_axes(like))

    def joined(variable: nnx.Variable) -> nnx.Variable:
        if not names:
            return variable
        dimension = variable.get_metadata()["axes"].index(axis)
        return variable.replace(jax.lax.all_gather(variable.get_value(), names, axis=dimension, tiled=True))

    return nnx.merge(graph, jax.tree.map(joined, params, is_leaf=lambda node: isinstance(node, nnx.Variable)))


# Traced once per shape: a 61-layer model asks for the same few a thousand times.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return std * jax.random.normal(key, shape, dtype)


class Linear(nnx.Module):
    """y = x Wᵀ (+ bias), W [out, in] as published; accumulates in float32, answers in x's dtype."""

    def __init__(self, init: Init, out: int, in_: int, axes: tuple[str | None, str | None], *, bias: bool = False):
        self.weight = init.normal((out, in_), axes)
        self.bias = init.zeros((out,), axes[:1]) if bias else None

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """x [..., in] -> [..., out], in `dtype` where one is given."""
        y = jnp.einsum("...i,oi->...o", x, self.weight[...], preferred_element_type=jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(dtype or x.dtype)
