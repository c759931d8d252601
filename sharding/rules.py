"""Tables from logical axes of weights and activations to mesh axes, one table for each purpose.

Weights have the same entries in all of them, since one copy of the weights serves prefill and decoding. A logical axis
that a table does not name is replicated; one with several mesh axes is sharded over all of them, the first outermost.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

REPLICATED = PartitionSpec()
Rules = Mapping[str, tuple[str, ...]]

WEIGHTS: Rules = {
    # Experts are sharded over the whole mesh. Axes that their number does not divide by shard each expert's width.
    "expert": ("data", "expert", "tensor", "sequence"),
    "expert_mlp": ("data", "expert", "tensor", "sequence"),
    "shared_mlp": ("data", "expert", "tensor", "sequence"),
    "mlp": ("expert", "tensor", "sequence"),
    "vocab": ("expert", "tensor", "sequence"),
    "heads": ("tensor", "sequence"),
    # The columns of the low-rank projections, gathered before their norm; replicated where they do not divide.
    "latent": ("tensor", "sequence"),
    # Not over `sequence`, which shards a prompt's tokens: the state passes from one device to the next.
    "kda_heads": ("tensor",),
}
DECODE: Rules = {**WEIGHTS, "batch": ("data",), "pages": ("data", "sequence"), "row_pages": ("sequence",)}
PREFILL: Rules = {**DECODE, "tokens": ("sequence",)}
TRAIN: Rules = {**WEIGHTS, "batch": ("data",), "tokens": ("sequence",)}


def spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules = DECODE
) -> PartitionSpec:
    """Returns the PartitionSpec on `mesh` of an array of `shape` with logical `axes`.

    Raises ValueError where two dimensions want the same mesh axis, or one does not divide by its axes.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
    names: list[tuple[str, ...]] = []
    left: list[str] = []
    for axis, size in zip(axes, shape, strict=True):
        wanted = [name for name in rules.get(axis or "", ()) if mesh.shape.get(name, 1) > 1]
        if axis == "expert_mlp" and "expert" in axes:
            wanted = left
        taken, rest = divide_axes(wanted, size, mesh)
        if axis == "expert":
            left = rest
        elif rest and axis == "latent":
            taken = []
        elif rest:
            sizes = " x ".join(f"{name!r} of {mesh.shape[name]}" for name in wanted)
            raise ValueError(f"axis {axis!r} of {size} does not divide by mesh axis {sizes}")
        names.append(tuple(taken))
    used = [name for group in names for name in group]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {axes} of shape {shape} use a mesh axis twice: {names}")
    return PartitionSpec(*(group if len(group) > 1 else group[0] if group else None for group in names))


def tree_specs(arrays: Any, axes: Any, mesh: Mesh | AbstractMesh | None = None) -> Any:
    """Returns `spec` of every array of a tree, given a tree with their logical axes; on the mesh in use where `mesh` is
    None."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return jax.tree.map(lambda array, names: spec(names, array.shape, mesh), arrays, axes)


def divide_axes(wanted: list[str], size: int, mesh: Mesh | AbstractMesh) -> tuple[list[str], list[str]]:
    """Splits the wanted mesh axes into those by which `size` divides, taken in order, and the others."""
    taken: list[str] = []
    for name in wanted:
        if size % (prod(mesh.shape[other] for other in taken) * mesh.shape[name]) == 0:
            taken.append(name)
    return taken, [name for name in wanted if name not in taken]
