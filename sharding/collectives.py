"""Messages between devices, named by logical axes. On a single device every function here returns its argument.

A model's step runs under one `shard_map` (`shard_over_mesh`): its code sees each device's shard of every array, and
data moves between devices only where a function of this package moves it.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from sharding.rules import PREFILL

Function = TypeVar("Function", bound=Callable[..., Any])


def shard_over_mesh(compute: Function, in_specs: Any, out_specs: Any) -> Function:
    """Returns `compute` run on every device of the mesh in use with that device's shards; `compute` itself without a
    mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute
    # The kernels' loops carry values that vary over the mesh from constants that do not, which the check refuses.
    return jax.shard_map(compute, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def active_axes(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of those mesh axes that have several devices under the `shard_map` that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Returns the mesh axes over which a logical axis is sharded."""
    return active_axes(PREFILL.get(axis, ()))


def num_devices(names: Sequence[str]) -> int:
    """Returns the number of devices along these mesh axes."""
    return prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def device_index(names: tuple[str, ...]) -> Array | int:
    """Returns this device's number along these mesh axes, the first outermost."""
    return lax.axis_index(names) if names else 0


def num_shards(axis: str) -> int:
    """Returns the number of shards of a logical axis."""
    return num_devices(mesh_axes(axis))


def shard_index(axis: str) -> Array | int:
    """Returns the number of this device's shard of a logical axis."""
    return device_index(mesh_axes(axis))


def all_reduce(x: Array, names: Sequence[str]) -> Array:
    """Sums `x` over these mesh axes."""
    return lax.psum(x, tuple(names)) if names else x


def gather_columns(shards: Sequence[Array], widths: Sequence[int], axis: str) -> list[Array]:
    """All-gathers column shards of several arrays [..., columns] over logical axis `axis`, in one message.

    `widths` are the whole arrays' numbers of columns; an array that has as many is returned as it is.
    """
    whole = [shard.shape[-1] == width for shard, width in zip(shards, widths, strict=True)]
    if all(whole):
        return list(shards)
    sent = [shard for shard, complete in zip(shards, whole, strict=True) if not complete]
    blocks = lax.all_gather(jnp.concatenate(sent, axis=-1), mesh_axes(axis))
    ends = [sum(shard.shape[-1] for shard in sent[: i + 1]) for i in range(len(sent) - 1)]
    gathered = iter(
        jnp.moveaxis(block, 0, -2).reshape(*block.shape[1:-1], -1) for block in jnp.split(blocks, ends, axis=-1)
    )
    return [shard if complete else next(gathered) for shard, complete in zip(shards, whole, strict=True)]
