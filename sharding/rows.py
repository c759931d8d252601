"""Data parallelism: what treats each row of a batch alone runs where the row lies."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

Shared = TypeVar("Shared")
Rows = TypeVar("Rows")
Results = TypeVar("Results")


def over_rows(compute: Callable[[Shared, Rows, Array | int], Results], shared: Shared, rows: Rows) -> Results:
    """compute(shared, rows, shard), split over the data axis of the mesh in use where there is one.

    `shared` is a tree of arrays that every device has; `rows` and the results are trees whose leading axes are rows,
    or as many pages for each row. A device's call gets its own rows; `shard` is the number of its part. Rows that do
    not divide by the data axis are computed by all devices. Kernels need this: XLA's partitioner cannot split them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(shared, rows, 0)
    divide = all(array.shape[0] % mesh.shape["data"] == 0 for array in jax.tree.leaves(rows))
    over = PartitionSpec("data" if divide else None)

    def local(shared: Shared, rows: Rows) -> Results:
        return compute(shared, rows, jax.lax.axis_index("data") if divide else 0)

    split = jax.shard_map(
        local,
        in_specs=(PartitionSpec(), over),
        out_specs=over,
        check_vma=False,  # the kernels' loops carry values that vary over the mesh from constants that do not
    )
    return split(shared, rows)


def everywhere(compute: Callable[[Shared, Rows], Results], shared: Shared, rows: Rows) -> Results:
    """compute(shared, rows) on every device of the mesh in use, the same on all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(shared, rows)
    all_of_it = PartitionSpec()
    split = jax.shard_map(compute, in_specs=(all_of_it, all_of_it), out_specs=all_of_it, check_vma=False)
    return split(shared, rows)
