"""The nearest orthogonal matrix, nearly: Muon's Newton-Schulz iteration, once for all matrices of a shape.

X <- a X + (b A + c A A) X with A = X Xᵀ drives all singular values of X towards 1, to about 0.7 to 1.2 in five steps:
its coefficients are the steepest at zero, and do not converge (Keller Jordan, https://kellerjordan.github.io/posts/muon).
"""

import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sharding import SINGLE_DEVICE, MatrixHomes, Partition

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Divides a matrix of zeros, whose norm is zero.
EPSILON = 1e-8
# A device's bytes of matrices that are worked on at one time, in float32. A model's experts are many times that.
STACK_BYTES = 2**30


def orthogonalize(
    stack: Float[Array, "s rows columns"], steps: int = 5, dtype: DTypeLike = jnp.float32
) -> Float[Array, "s rows columns"]:
    """Orthogonalises each matrix of a stack, of no more rows than columns, in `dtype`; returns the stack's dtype."""
    a, b, c = COEFFICIENTS
    exact = lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT

    def product(x: Array, y: Array, spelled: str) -> Array:
        return jnp.einsum(spelled, x, y, precision=exact, preferred_element_type=jnp.float32)

    def step(x: Array, _: None) -> tuple[Array, None]:
        gram = product(x, x, "srk,stk->srt").astype(dtype)
        polynomial = b * gram.astype(jnp.float32) + c * product(gram, gram, "srt,stu->sru")
        return (a * x.astype(jnp.float32) + product(polynomial.astype(dtype), x, "srt,stk->srk")).astype(dtype), None

    norms = jnp.linalg.norm(stack.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x, _ = lax.scan(step, (stack.astype(jnp.float32) / (norms + EPSILON)).astype(dtype), length=steps)
    return x.astype(stack.dtype)


def orthogonalize_leaves(
    leaves: Sequence[Float[Array, "..."]],
    specs: Sequence[PartitionSpec],
    partition: Partition = SINGLE_DEVICE,
    steps: int = 5,
    dtype: DTypeLike = jnp.float32,
) -> list[Float[Array, "..."]]:
    """Orthogonalises every matrix of arrays [*stack, out, in], sharded by `specs`; results are sharded alike.

    The matrices of one shape, transposes included, are one stack, or several of `STACK_BYTES` each. On a mesh each
    matrix is worked on by one device.
    """
    results = list(leaves)
    for members in _stacks(leaves, specs, partition):
        chosen = tuple(specs[i] for i in members)
        wide = [leaves[i].shape[-2] <= leaves[i].shape[-1] for i in members]

        def on_device(*shards: Array, chosen: tuple[PartitionSpec, ...] = chosen, wide: list[bool] = wide) -> tuple:
            return _orthogonalize_shape(shards, chosen, wide, partition, steps, dtype)

        done = partition.shard_map(on_device, chosen, chosen)(*(leaves[i] for i in members))
        for i, leaf in zip(members, done, strict=True):
            results[i] = leaf
    return results


def _stacks(leaves: Sequence[Array], specs: Sequence[PartitionSpec], partition: Partition) -> Iterator[list[int]]:
    """Yields the numbers of the arrays of each stack."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, leaf in enumerate(leaves):
        rows, columns = sorted(leaf.shape[-2:])
        shapes.setdefault((rows, columns), []).append(i)
    for members in shapes.values():
        taken: list[int] = []
        total = 0
        for i in members:
            size = 4 * partition.local_size(leaves[i].shape, specs[i])
            if taken and total + size > STACK_BYTES:
                yield taken
                taken, total = [], 0
            taken.append(i)
            total += size
        yield taken


def _orthogonalize_shape(
    shards: Sequence[Array],
    specs: Sequence[PartitionSpec],
    wide: Sequence[bool],
    partition: Partition,
    steps: int,
    dtype: DTypeLike,
) -> tuple[Array, ...]:
    """Works on this device's shards of all arrays whose matrices have one shape, or its transpose."""
    homes: dict[MatrixHomes, list[int]] = {}
    for i, spec in enumerate(specs):
        homes.setdefault(MatrixHomes.from_spec(spec, partition, not wide[i]), []).append(i)
    # (in `dtype`, which they travel in)
    stacks = [_stacked([_turned(shards[i], wide[i]).astype(dtype) for i in members]) for members in homes.values()]
    gathered = [home.gather_matrices(stack) for home, stack in zip(homes, stacks, strict=True)]
    solved = orthogonalize(jnp.concatenate(gathered), steps, dtype)
    results = list(shards)
    ends = list(itertools.accumulate(len(matrices) for matrices in gathered))[:-1]
    for (home, members), stack, part in zip(homes.items(), stacks, jnp.split(solved, ends), strict=True):
        local = home.scatter_matrices(part, len(stack))
        sizes = itertools.accumulate(_count(shards[i]) for i in members)
        for i, matrices in zip(members, jnp.split(local, list(sizes)[:-1]), strict=True):
            results[i] = _turned(matrices, wide[i]).reshape(shards[i].shape).astype(shards[i].dtype)
    return tuple(results)


def _turned(array: Array, wide: bool) -> Array:
    return array if wide else jnp.swapaxes(array, -1, -2)


def _stacked(arrays: Sequence[Array]) -> Float[Array, "s rows columns"]:
    return jnp.concatenate([array.reshape(-1, *array.shape[-2:]) for array in arrays])


def _count(array: Array) -> int:
    """Returns an array's number of matrices."""
    return array.size // (array.shape[-2] * array.shape[-1])
