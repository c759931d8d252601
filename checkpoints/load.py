"""Fills a `Kimi` from a checkpoint, sharded: an Orbax checkpoint of ours, or a published folder directly.

A bounded batch of leaves at a time, each process reads the bytes of its own shards; of what several processes are to
hold alike, each reads a part, and the rest comes from the others over the interconnect. What is stored becomes what
the model computes with on the device: INT4 words the kernels' codes, FP8 blocks bf16.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from checkpoints.jobs.progress import Counter, Progress
from checkpoints.jobs.verify import check
from checkpoints.published.endings import is_scales
from checkpoints.published.reading import Remote
from checkpoints.stored.layout import Box
from checkpoints.stored.names import Leaf, variable_path
from checkpoints.stored.sources import ConvertedSource, PublishedSource, open_checkpoint
from kimi_jax.model.kimi import Kimi
from pallas_kernels.formats import Dense, Weight
from sharding import SERVE, Partition, Rules

BATCH_BYTES = 2**28  # held besides the model; one projection of a layer's experts may be more, and then goes alone
READERS = 8  # a bucket answers many at once, and a disk too
_VISION = ("vision_tower.", "mm_projector.")


def load(
    path: str | Path | Remote,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    rules: Rules = SERVE,
    only: Sequence[str] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Kimi:
    """The model in `path`, a folder or URL: an Orbax checkpoint of ours, or a published folder of safetensors.

    Its arrays are sharded over `mesh` by `rules`, or on the default device without a mesh. `dtype` casts the
    parameters, None keeps them as stored, FP8 as bf16, since the model does not compute in FP8. INT4 scales stay bf16,
    and the router's bias, `A_log` and `dt_bias` are float32 in any case. With `verify`, every chunk of a converted
    checkpoint is first held against its checksum, each process its share of them.

    `only` names parts of the tree, like "model.layers.3" or "lm_head": nothing else is read, and what is left out stays
    abstract (`jax.ShapeDtypeStruct`). Without any of its vision, ("model", "lm_head"), it is a model of text alone.
    `progress` counts the bytes that this process reads.

    Raises FileNotFoundError where `path` holds no checkpoint, ConfigError or CheckpointError (both ValueErrors) where
    it is damaged or of another model than its config.json says, ValueError where `mesh` does not divide the experts, or
    the model has no part that `only` names.
    """
    source = open_checkpoint(path)
    if verify:
        check(path, process_index=jax.process_index(), num_processes=jax.process_count())
    graphdef, state = nnx.split(source.contents.model)
    variables = dict(nnx.to_flat_state(state))
    leaves = _chosen(source.contents.leaves, only)

    def out(path: str) -> Sharding:
        variable = variables[variable_path(path)]
        return _sharding(variable.get_metadata()["axes"], variable.shape, mesh, rules)

    reader = _Reader(source, leaves, mesh, rules, progress)
    for batch in _batches(leaves):
        arrays = reader.arrays(batch)
        values: dict[str, jax.Array] = {}
        for leaf in batch:
            weight = leaf.weight
            if is_scales(leaf.path):  # which go with their words or e4m3
                continue
            if weight is not None and weight.format is not Dense:
                stored = tuple(arrays.pop(name) for name in weight.names)
                names = [name for name in weight.names if variable_path(name) in variables]
                keeps = len(names) == len(weight.names)
                convert = _from_stored(weight.format.from_stored, keeps, tuple(map(out, names)))
                made = convert(stored, dtype or jnp.bfloat16)
                values |= dict(zip(names, made, strict=True))
            else:
                variable = variables[variable_path(leaf.path)]
                # what a bf16 model has in float32 is float32 in any
                to_dtype = variable.dtype if variable.dtype == jnp.float32 else dtype or leaf.dtype
                to = jax.ShapeDtypeStruct(variable.shape, to_dtype)
                values[leaf.path] = _dense(arrays.pop(leaf.path), to, out(leaf.path))
        jax.block_until_ready(values)
        for path, value in values.items():
            variables[variable_path(path)] = variables[variable_path(path)].replace(value)
    model = nnx.merge(graphdef, nnx.from_flat_state(variables))
    if not any(leaf.path.startswith(_VISION) for leaf in leaves):
        model.vision_tower = model.mm_projector = None
        model.config = dataclasses.replace(model.config, vision=None)
    return model


def _chosen(leaves: Sequence[Leaf], only: Sequence[str] | None) -> list[Leaf]:
    def within(leaf: Leaf, part: str) -> bool:
        return f"{leaf.path}.".startswith(f"{part}.")

    if only is None:
        return list(leaves)
    for part in only:
        if not any(within(leaf, part) for leaf in leaves):
            raise ValueError(f"only={part!r}: the model has no such part; one is {leaves[0].path.rsplit('.', 1)[0]!r}")
    # words or e4m3 are of no use without their scales
    weights = {_weight(leaf) for leaf in leaves if any(within(leaf, part) for part in only)}
    return [leaf for leaf in leaves if _weight(leaf) in weights]


class _Reader:
    """Reads stored leaves as arrays on the mesh."""

    def __init__(
        self,
        source: PublishedSource | ConvertedSource,
        leaves: Sequence[Leaf],
        mesh: Mesh | None,
        rules: Rules,
        progress: Progress | None,
    ):
        self.source = source
        self.lies = {leaf.path: _sharding(leaf.axes, leaf.shape, mesh, rules) for leaf in leaves}
        self.read = {leaf.path: _spread(self.lies[leaf.path], leaf.shape) for leaf in leaves}
        self.count = Counter(sum(map(self._nbytes, leaves)), progress)

    def arrays(self, leaves: Sequence[Leaf]) -> dict[str, jax.Array]:
        """The leaves by path, each as the rules say."""
        with ThreadPoolExecutor(READERS) as pool:
            found = {}
            for leaf in leaves:
                found[leaf.path], reads = self.source.blocks(leaf, set(self._boxes(leaf).values()))
                for _ in pool.map(lambda read: read(), reads):
                    pass
                self.count(self._nbytes(leaf))
        return {leaf.path: self._array(leaf, found.pop(leaf.path)) for leaf in leaves}

    def _array(self, leaf: Leaf, blocks: dict[Box, Any]) -> jax.Array:
        sharding, boxes = self.read[leaf.path], self._boxes(leaf)
        shards = [jax.device_put(blocks[box], device) for device, box in boxes.items()]
        array = jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)
        if sharding == self.lies[leaf.path]:
            return array
        # One at a time: with many under way, processes on CPU wait for each other for ever.
        return jax.block_until_ready(_gathered(self.lies[leaf.path])(array))

    def _boxes(self, leaf: Leaf) -> dict[jax.Device, Box]:
        devices = self.read[leaf.path].addressable_devices_indices_map(leaf.shape)
        return {
            device: tuple(part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True))
            for device, index in devices.items()
        }

    def _nbytes(self, leaf: Leaf) -> int:
        boxes = set(self._boxes(leaf).values())
        return sum(math.prod(stop - start for start, stop in box) for box in boxes) * leaf.dtype.itemsize


def _spread(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Where to read an array that is to lie as `sharding`: split over the mesh axes along which it is replicated too,
    so that no two processes read the same bytes."""
    if jax.process_count() == 1 or not isinstance(sharding, NamedSharding):
        return sharding
    dims = [axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in sharding.spec]
    dims += [()] * (len(shape) - len(dims))
    for name, size in sharding.mesh.shape.items():
        if size == 1 or any(name in axes for axes in dims):
            continue
        for i, axes in enumerate(dims):
            if shape[i] % (size * math.prod(sharding.mesh.shape[axis] for axis in axes)) == 0:
                dims[i] = (*axes, name)
                break
    return NamedSharding(sharding.mesh, PartitionSpec(*(axes or None for axes in dims)))


@functools.cache
def _gathered(out: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=out)


def _dense(array: jax.Array, to: jax.ShapeDtypeStruct, out: Sharding) -> jax.Array:
    """A stored floating-point leaf as the model has it: `A_log` [h], and the dtype asked for."""
    if array.shape == to.shape and array.dtype == to.dtype:
        return array
    return _reshaped(out)(array, to.shape, to.dtype)


# One compiled function for all weights that are alike.
@functools.cache
def _from_stored(make: Callable[..., Weight], keeps: bool, out: tuple[Sharding, ...]) -> Any:
    """Returns the function from a weight's stored tensors, of which `make` makes it, to the arrays that the model has.

    Those are its parts where the model `keeps` the format, else its numbers: the model does not compute in it.
    """

    def convert(stored: tuple[jax.Array, ...], dtype: Any) -> tuple[jax.Array, ...]:
        weight = make(*stored)
        return weight.arrays if keeps else (weight.dequantize(dtype),)

    return jax.jit(convert, static_argnums=1, out_shardings=out)


@functools.cache
def _reshaped(out: Sharding) -> Any:
    return jax.jit(
        lambda array, shape, dtype: array.reshape(shape).astype(dtype), static_argnums=(1, 2), out_shardings=out
    )


def _sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | None, rules: Rules) -> Sharding:
    if mesh is None:
        return jnp.zeros(()).sharding
    return NamedSharding(mesh, Partition(mesh, rules).spec(axes, shape))


def _batches(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """Leaves in batches of `BATCH_BYTES` or one weight, words always with their scales."""
    batch: list[Leaf] = []
    for _, group in groupby(sorted(leaves, key=lambda leaf: leaf.path), key=_weight):
        weight = list(group)
        if batch and sum(leaf.nbytes for leaf in (*batch, *weight)) > BATCH_BYTES:
            yield batch
            batch = []
        batch += weight
    yield batch


def _weight(leaf: Leaf) -> str:
    """The same for what one weight is stored as."""
    return leaf.path.rsplit(".", 1)[0]
