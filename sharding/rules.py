"""Logical axes of weights and activations -> mesh axes: one small table."""

from jax.sharding import Mesh, PartitionSpec

# A logical axis that is not named here is not sharded.
RULES = {"expert": "expert", "batch": "data"}


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How an array of `shape` with logical `axes` lies on `mesh`.

    Raises ValueError where two dimensions want the same mesh axis, or one does not divide by it.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
    names = [RULES.get(axis) if axis is not None else None for axis in axes]
    used = [name for name in names if name is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} of shape {shape} use a mesh axis twice: {names}")
    for axis, size, name in zip(axes, shape, names, strict=True):
        if name is not None and size % mesh.shape[name]:
            raise ValueError(f"axis {axis!r} of {size} does not divide by mesh axis {name!r} of {mesh.shape[name]}")
    return PartitionSpec(*names)
