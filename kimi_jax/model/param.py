"""Weights: made on one line with shape, logical axes and initialiser, sharded by a partition, and `Linear`."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from pallas_kernels import matmul
from pallas_kernels.formats import Dense, Weight
from sharding import SERVE, Partition, Rules, all_gather

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Init:
    """Makes parameters. `axes` are logical names that `sharding.rules` maps to mesh axes; None is never sharded."""

    key: jax.Array
    dtype: jnp.dtype
    std: float = 0.02
    drawn: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def next_key(self) -> jax.Array:
        """Returns a key that no other parameter has. (A stream of `nnx.Rngs` does too, ten times slower under
        tracing.)"""
        return jax.random.fold_in(self.key, next(self.drawn))

    def in_float32(self) -> "Init":
        """Returns an `Init` for the parameters that a model of any dtype has in float32, of the same stream of keys."""
        return dataclasses.replace(self, dtype=jnp.dtype(jnp.float32))

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return self.param(_normal(self.next_key(), shape, self.dtype, self.std), axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return self.param(jnp.ones(shape, self.dtype), axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return self.param(jnp.zeros(shape, self.dtype), axes)

    def weight(
        self, weight_format: type[Weight], shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> dict[str, nnx.Variable]:
        """Draws a weight [..., out, in] in a format; returns its parts by name.

        Parts that gradients do not reach are no `nnx.Param`, so that no optimizer takes them.
        """
        weight = _quantize(weight_format, _normal(self.next_key(), shape, self.dtype, self.std))
        kind = nnx.Param if weight_format.trained else nnx.Variable
        return {
            part.name: kind(array, axes=part.axes(axes), full_shape=array.shape)
            for part, array in zip(weight_format.parts, weight.arrays, strict=True)
        }

    def param(self, value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
        if len(axes) != value.ndim:
            raise ValueError(f"{len(axes)} axes {axes} for a parameter of shape {value.shape}")
        return nnx.Param(value, axes=axes, full_shape=value.shape)


def map_weights(change: Callable[[jax.Array, tuple[str | None, ...], tuple[int, ...]], Any], params: Any) -> Any:
    """Replaces every parameter by `change(array, logical axes, shape over all devices)`."""

    def replace(variable: nnx.Variable) -> nnx.Variable:
        marks = variable.get_metadata()
        return variable.replace(change(variable.get_value(), marks["axes"], marks["full_shape"]))

    return jax.tree.map(replace, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def weight_specs(params: Any, partition: Partition) -> Any:
    """Returns the PartitionSpec of every parameter."""
    return map_weights(lambda _, axes, shape: partition.spec(axes, shape), params)


def weight_shardings(params: Any, mesh: Mesh | AbstractMesh, rules: Rules = SERVE) -> Any:
    """Returns the sharding of every parameter on the devices of `mesh`: what `jax.device_put` takes."""
    partition = Partition(mesh, rules)
    return map_weights(lambda _, axes, shape: NamedSharding(mesh, partition.spec(axes, shape)), params)


def placed(module: Module, mesh: Mesh | AbstractMesh, rules: Rules = SERVE) -> Module:
    """Returns the module of shapes, sharded over `mesh` by `rules`."""
    graph, params = nnx.split(module)
    shardings = weight_shardings(params, mesh, rules)
    shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, shardings)
    return nnx.merge(graph, shapes)


def gather_weights(module: Module, partition: Partition) -> Module:
    """Returns the module with those shards gathered that rules keep in memory only (`Rule.gathered`).

    A gradient goes back by a reduce-scatter, so that it is sharded as the weights are.
    """
    if not any(rule.gathered for rule in partition.rules):
        return module

    def gather(array: jax.Array, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> jax.Array:
        for dimension, names in partition.gathered_axes(axes, shape).items():
            array = all_gather(array, names, dimension)
        return array

    graph, params = nnx.split(module)
    return nnx.merge(graph, map_weights(gather, params))


def reshard(module: Module, axis: str, like: str, partition: Partition) -> Module:
    """Returns the module with logical axis `axis` of its weights sharded as `like`, gathered over other mesh axes."""
    names = tuple(name for name in partition.axis_names(axis) if name not in partition.axis_names(like))
    graph, params = nnx.split(module)
    return nnx.merge(graph, map_weights(lambda array, axes, _: all_gather(array, names, axes.index(axis)), params))


# Traced once per shape: a 61-layer model asks for the same few a thousand times.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return std * jax.random.normal(key, shape, dtype)


@functools.partial(jax.jit, static_argnums=0)
def _quantize(weight_format: type[Weight], weight: jax.Array) -> Weight:
    return weight_format.from_dense(weight)


class Matrix(nnx.Module):
    """A weight, or a stack of them, in some format: an attribute for each part, named as the format names it."""

    def __init__(
        self, init: Init, shape: tuple[int, ...], axes: tuple[str | None, ...], weight_format: type[Weight] = Dense
    ):
        self.weight_format = weight_format
        for name, part in init.weight(weight_format, shape, axes).items():
            setattr(self, name, part)

    def read(self) -> Weight:
        """Returns the weight [..., out, in] that the parts hold."""
        return self.weight_format(*(getattr(self, part.name)[...] for part in self.weight_format.parts))


class Linear(Matrix):
    """y = x Wᵀ (+ bias), W [out, in] as published; accumulates in float32, answers in x's dtype."""

    weight: nnx.Param  # in a dense one

    def __init__(
        self,
        init: Init,
        out: int,
        in_: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        weight_format: type[Weight] = Dense,
    ):
        super().__init__(init, (out, in_), axes, weight_format)
        self.bias = init.zeros((out,), axes[:1]) if bias else None

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """Maps x [..., in] to [..., out], in `dtype` where one is given."""
        y = matmul(x, self.read(), dtype=jnp.float32)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(dtype or x.dtype)
