"""Expert parallelism: every device multiplies the tokens of its data shard by the experts that it holds.

Tokens are alike on all devices of the expert axis, so nothing is sent before the experts, and no token can be dropped;
the sums of partial results over that axis are the only communication. Weights never move.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32

Shared = TypeVar("Shared")
Experts = TypeVar("Experts")


def over_experts(
    compute: Callable[[Array, Shared, Experts, Array | int], Float32[Array, "t d"]],
    x: Float[Array, "t row"],
    shared: Shared,
    experts: Experts,
) -> Float32[Array, "t d"]:
    """compute(x, shared, experts, first), split over the mesh in use where there is one.

    `shared` is a tree of arrays that every device has (the router); `experts` one with the experts on their leading
    axis. A device's call gets its own experts, `first` the number of the first of them, and must leave out the others'
    part of the sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(x, shared, experts, 0)
    # An odd token count (one row's prefill on many data shards) is computed by all of them.
    rows = PartitionSpec("data" if x.shape[0] % mesh.shape["data"] == 0 else None)

    def local(x: Array, shared: Shared, experts: Experts) -> Array:
        held = jax.tree.leaves(experts)[0].shape[0]
        return jax.lax.psum(compute(x, shared, experts, held * jax.lax.axis_index("expert")), "expert")

    split = jax.shard_map(
        local,
        in_specs=(rows, PartitionSpec(), PartitionSpec("expert")),
        out_specs=rows,
        check_vma=False,  # the kernels' loops carry values that vary over the mesh from constants that do not
    )
    return split(x, shared, experts)
