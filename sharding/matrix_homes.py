"""An exchange that gives each matrix of a stack one home: for work on whole matrices that are sharded otherwise.

Every device has a shard of each matrix, and devices that differ in other mesh axes have copies. Each copy takes its own
part of the stack; an all-to-all among the shards of a copy then assembles each matrix on one device, where it is worked
on once. The way back is an all-to-all of shards, and an all-gather of the stack over the copies. No device ever has
more than its part of whole matrices (the layout of Muon's momentum for Newton-Schulz, NVIDIA/Megatron-LM issue 6676).
"""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sharding.collectives import all_gather, num_devices, take_shard
from sharding.partition import Partition


@dataclass(frozen=True)
class MatrixHomes:
    """The mesh axes over which matrices [*stack, rows, columns] of one spec are sharded, and those of their copies."""

    row_axes: tuple[str, ...] = ()
    column_axes: tuple[str, ...] = ()
    copy_axes: tuple[str, ...] = ()

    @classmethod
    def from_spec(cls, spec: PartitionSpec, partition: Partition, transposed: bool = False) -> "MatrixHomes":
        """Returns the homes of an array [*stack, rows, columns] with this spec, or of its transposed matrices."""
        *stack, rows, columns = (_names(entry) for entry in spec)
        used = {name for entry in (*stack, rows, columns) for name in entry}
        copies = tuple(name for name in partition.mesh_axes if name not in used)
        return cls(columns, rows, copies) if transposed else cls(rows, columns, copies)

    def gather_matrices(self, shards: Float[Array, "s r c"]) -> Float[Array, "homes rows columns"]:
        """Returns the matrices that are at home here, zeros among them where the stack does not divide."""
        names, devices = self.row_axes + self.column_axes, num_devices(self.row_axes + self.column_axes)
        padding = -len(shards) % (devices * num_devices(self.copy_axes))
        local = take_shard(jnp.pad(shards, ((0, padding), (0, 0), (0, 0))), self.copy_axes, axis=0)
        if not names:
            return local
        received = lax.all_to_all(rearrange(local, "(d n) r c -> d n r c", d=devices), names, 0, 0)
        return rearrange(received, "(i j) n r c -> n (i r) (j c)", i=num_devices(self.row_axes))

    def scatter_matrices(self, matrices: Float[Array, "homes rows columns"], size: int) -> Float[Array, "s r c"]:
        """Returns this device's shards of all `size` matrices, given those that are at home here."""
        names = self.row_axes + self.column_axes
        if names:
            rows, columns = num_devices(self.row_axes), num_devices(self.column_axes)
            shards = rearrange(matrices, "n (i r) (j c) -> (i j) n r c", i=rows, j=columns)
            matrices = rearrange(lax.all_to_all(shards, names, 0, 0), "d n r c -> (d n) r c")
        return all_gather(matrices, self.copy_axes, axis=0)[:size]


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
