"""Device meshes. Two axes: `data` splits the batch, `expert` splits the routed experts."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

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
