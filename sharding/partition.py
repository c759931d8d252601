"""A mesh and a table of rules as one value, which is passed to everything that asks how arrays are sharded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from sharding.collectives import device_index
from sharding.rules import SERVE, Rule, Rules

Function = TypeVar("Function", bound=Callable[..., Any])

REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class Partition:
    """Shards arrays over `mesh` by `rules`; without a mesh everything is on a single device.

    Mesh axes of one device never occur in what the methods return.
    """

    mesh: Mesh | AbstractMesh | None = None
    rules: Rules = SERVE

    def __post_init__(self) -> None:
        if isinstance(self.mesh, Mesh):  # equal partitions of the same shape then share what is compiled
            object.__setattr__(self, "mesh", self.mesh.abstract_mesh)

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """All mesh axes of several devices."""
        return () if self.mesh is None else tuple(name for name, size in self.mesh.shape.items() if size > 1)

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return self.num_devices(self.mesh_axes)

    def num_devices(self, names: Sequence[str]) -> int:
        """Returns the number of devices along these mesh axes."""
        return 1 if self.mesh is None else prod(self.mesh.shape[name] for name in names)

    def axis_names(self, axis: str | None, size: int | None = None) -> tuple[str, ...]:
        """Returns the mesh axes over which a logical axis is sharded; with `size`, only those by which it divides.

        The result holds for an array none of whose other dimensions is sharded.
        """
        rule = _find(self.rules, axis)
        wanted = () if rule is None else self._several(rule.mesh_axes)
        return wanted if size is None else self._dividing(wanted, size)

    def num_shards(self, axis: str) -> int:
        """Returns the number of shards of a logical axis."""
        return self.num_devices(self.axis_names(axis))

    def shard_index(self, axis: str) -> Array | int:
        """Returns the number of this device's shard of a logical axis, under `shard_map`."""
        return device_index(self.axis_names(axis))

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """Returns the PartitionSpec of an array of `shape` with logical `axes`.

        Raises ValueError where two dimensions want the same mesh axis, or one does not divide by its axes.
        """
        groups = self._groups(axes, shape)
        return PartitionSpec(*(group if len(group) > 1 else group[0] if group else None for group in groups))

    def tree_specs(self, arrays: Any, axes: Any) -> Any:
        """Returns the `spec` of every array of a tree, given a tree with their logical axes."""
        return jax.tree.map(lambda array, names: self.spec(names, array.shape), arrays, axes)

    def local_size(self, shape: tuple[int, ...], spec: PartitionSpec) -> int:
        """Returns a device's number of elements of an array. (`NamedSharding.shard_shape` takes ten times as long.)"""
        names = [name for group in spec for name in ((group,) if isinstance(group, str) else group or ())]
        return prod(shape) // self.num_devices(names)

    def gathered_axes(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
        """Returns, for an array of `shape` over all devices, the dimensions to gather before use and their mesh
        axes."""
        rules = [_find(self.rules, axis) for axis in axes]
        if not any(rule is not None and rule.gathered for rule in rules):
            return {}
        groups = self._groups(axes, shape)
        return {i: groups[i] for i, rule in enumerate(rules) if rule is not None and rule.gathered and groups[i]}

    def shard_map(self, compute: Function, in_specs: Any, out_specs: Any) -> Function:
        """Returns `compute` run on every device with that device's shards; `compute` itself on a single device."""
        if self.devices == 1:
            return compute
        # The kernels' loops carry values that vary over the mesh from constants that do not, which the check refuses.
        return jax.shard_map(compute, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _several(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.mesh_axes)

    def _dividing(self, names: Sequence[str], size: int) -> tuple[str, ...]:
        """Returns the mesh axes by which `size` divides, taken in order."""
        dividing: tuple[str, ...] = ()
        for name in names:
            if size % self.num_devices((*dividing, name)) == 0:
                dividing = (*dividing, name)
        return dividing

    def _groups(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
        """Returns the mesh axes of each dimension."""
        if len(axes) != len(shape):
            raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
        groups: list[tuple[str, ...]] = [()] * len(axes)
        for rule in self.rules:
            for i in (i for i, axis in enumerate(axes) if axis == rule.axis):
                used = {name for group in groups for name in group}
                wanted = self._several(rule.mesh_axes)
                if rule.taken == "skip":
                    wanted = tuple(name for name in wanted if name not in used)
                groups[i] = self._dividing(wanted, shape[i])
                if used & set(groups[i]):
                    raise ValueError(f"logical axes {axes} of shape {shape} use a mesh axis twice: {groups}")
                if groups[i] != wanted:
                    groups[i] = self._uneven(rule, wanted, groups[i], shape[i])
        return groups

    def _uneven(self, rule: Rule, wanted: tuple[str, ...], dividing: tuple[str, ...], size: int) -> tuple[str, ...]:
        if rule.uneven == "refuse":
            sizes = " x ".join(f"{name!r} of {self.num_devices((name,))}" for name in wanted)
            raise ValueError(f"axis {rule.axis!r} of {size} does not divide by mesh axis {sizes}")
        return dividing if rule.uneven == "skip" else ()


def _find(rules: Rules, axis: str | None) -> Rule | None:
    return next((rule for rule in rules if rule.axis == axis), None)


SINGLE_DEVICE = Partition()
