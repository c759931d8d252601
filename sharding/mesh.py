"""Device meshes. Two axes: `data` splits the batch, `expert` splits the routed experts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

AXES = ("data", "expert")


def make_mesh(shape: str | tuple[int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `devices` (default: all), `shape` = (data, expert) as a pair or as text: "2x4".

    Raises ValueError where the shape is not two positive numbers or does not multiply to the number of devices.
    """
    try:
        sizes = tuple(int(n) for n in (shape.split("x") if isinstance(shape, str) else shape))
    except ValueError:
        sizes = ()
    if len(sizes) != len(AXES) or min(sizes) < 1:
        raise ValueError(f"mesh {shape!r}: expected two positive numbers for the axes {' x '.join(AXES)}, like 2x4")
    devices = jax.devices() if devices is None else devices
    if sizes[0] * sizes[1] != len(devices):
        raise ValueError(f"mesh {shape!r} asks for {sizes[0] * sizes[1]} devices, there are {len(devices)}")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_of(array: jax.Array) -> AbstractMesh | None:
    """The mesh that the array lies on, None for a single device."""
    return array.sharding.mesh.abstract_mesh if isinstance(array.sharding, NamedSharding) else None


def using(mesh: AbstractMesh | None) -> AbstractContextManager[object]:
    """While tracing in this context, `shard_map` and `over_experts` split over `mesh`."""
    return nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)
