"""What devices send each other, in terms of logical axes. Everything here is the identity on a single device.

A model's step runs under one `shard_map` (`over_mesh`): its code sees each device's part of every array, and nothing
moves but what a function of this package moves.
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


def over_mesh(compute: Function, in_specs: Any, out_specs: Any) -> Function:
    """`compute` on every device of the mesh in use, each with its part of the arguments; as it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute
    # The kernels' loops carry values that vary over the mesh from constants that do not, which the check refuses.
    return jax.shard_map(compute, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def split(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the mesh axes that split something here."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def over(axis: str) -> tuple[str, ...]:
    """The mesh axes over which a logical axis is split here."""
    return split(PREFILL.get(axis, ()))


def size(names: Sequence[str]) -> int:
    """Devices along these mesh axes."""
    return prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def index(names: tuple[str, ...]) -> Array | int:
    """This device's number along these mesh axes, the first outermost."""
    return lax.axis_index(names) if names else 0


def parts(axis: str) -> int:
    """In how many parts a logical axis is split here."""
    return size(over(axis))


def part_of(axis: str) -> Array | int:
    """Which of them this device has."""
    return index(over(axis))


def total(x: Array, names: Sequence[str]) -> Array:
    """The sum over these mesh axes."""
    return lax.psum(x, tuple(names)) if names else x


def gathered(columns: Sequence[Array], widths: Sequence[int], axis: str) -> list[Array]:
    """Whole arrays, of which each device has some columns of the `widths` there are, by one message for all of them."""
    if all(part.shape[-1] == width for part, width in zip(columns, widths, strict=True)):
        return list(columns)
    names = over(axis)
    whole = [part.shape[-1] == width for part, width in zip(columns, widths, strict=True)]
    sent = [part for part, done in zip(columns, whole, strict=True) if not done]
    blocks = lax.all_gather(jnp.concatenate(sent, axis=-1), names)
    ends = [sum(part.shape[-1] for part in sent[: i + 1]) for i in range(len(sent) - 1)]
    joined = iter(
        jnp.moveaxis(block, 0, -2).reshape(*block.shape[1:-1], -1) for block in jnp.split(blocks, ends, axis=-1)
    )
    return [part if done else next(joined) for part, done in zip(columns, whole, strict=True)]
