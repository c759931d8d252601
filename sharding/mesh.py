"""Device meshes with four axes, each of any size from 1.

data      shards the batch's rows with their cache, and experts
expert    shards experts, dense feed-forward layers and the vocabulary; attention is replicated over it
tensor    shards these and attention heads
sequence  shards these, a prompt's tokens and the pages of the cache, for long contexts
"""

import difflib
import math
import re
from collections.abc import Sequence

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

AXES = ("data", "expert", "tensor", "sequence")


def make_mesh(shape: str | Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of `devices` (default: all), in an order that follows their torus where they have one.

    `shape` gives sizes in the order of `AXES`, at least two of them and 1 for the rest, as numbers or as text ("2x4",
    "1x2x4x1"), or names with sizes ("data=4,tensor=2").
    Raises ValueError where `shape` is of none of these forms or does not multiply to the number of devices.
    """
    sizes = mesh_sizes(shape)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {shape!r} asks for {math.prod(sizes)} devices, there are {len(devices)}")
    # Axes may share a dimension of the torus: 128 x 2 devices of a 4 x 8 x 8 do.
    arranged = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(shape: str | Sequence[int]) -> tuple[int, ...]:
    """Reads a shape that `make_mesh` takes: one size for each of `AXES`. Raises ValueError for any other."""
    try:
        if isinstance(shape, str) and "=" in shape:
            pairs = [part.split("=") for part in shape.split(",")]
            named = {name.strip(): int(size) for name, size in pairs}
            sizes = tuple(named.pop(axis, 1) for axis in AXES) if len(named) == len(pairs) else ()
            sizes = () if named else sizes
        else:
            sizes = tuple(int(size) for size in (shape.split("x") if isinstance(shape, str) else shape))
    except ValueError:
        sizes = ()
    if not 2 <= len(sizes) <= len(AXES) or min(sizes) < 1:
        near = [
            difflib.get_close_matches(word, AXES, 1) for word in re.findall("[a-z]+", str(shape)) if word not in AXES
        ]
        meant = f"; did you mean {near[0][0]}?" if near and near[0] else ""
        raise ValueError(
            f"mesh {shape!r}: expected two to four positive numbers for the axes {' x '.join(AXES)}, like 2x4 or "
            f"1x2x4x1, or names with sizes, like data=4,tensor=2{meant}"
        )
    return sizes + (1,) * (len(AXES) - len(sizes))


def default_shape(devices: int, heads: int, batch: int = 1) -> tuple[int, int, int, int]:
    """Chooses a mesh shape for `devices`.

    Heads are sharded over up to eight of them, the batch over as many of the rest as it divides by, experts over all.
    """
    tensor = math.gcd(devices, heads, 8)
    data = math.gcd(devices // tensor, batch)
    return data, devices // tensor // data, tensor, 1


def array_mesh(array: jax.Array | jax.ShapeDtypeStruct) -> Mesh | AbstractMesh | None:
    """Returns the mesh that the array, or an array of this shape, is sharded over, None for one on a single device, and
    for a traced one, whose devices are not known yet."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array.sharding, NamedSharding):
        return None
    return array.sharding.mesh
