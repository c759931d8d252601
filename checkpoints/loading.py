"""Fills a model or a draft head from a checkpoint, sharded: an Orbax one of ours, or a published folder directly.

A source is opened (`open_source`). For each leaf, the byte ranges that this process's devices need are planned
(`plan_reads`) and read, a bounded batch of leaves at a time. Of a shard that several processes replicate, each reads a
part and the rest is all-gathered over the interconnect. On the device, stored weights become the model's: INT4 words
the kernels' codes, MXFP4 bytes theirs, FP8 blocks bf16.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from checkpoints.files.pipeline import Progress
from checkpoints.files.place import Remote, locate
from checkpoints.published.endings import bad_scales, is_scales
from checkpoints.published.numerics import UINT8
from checkpoints.published.safetensors import CheckpointError
from checkpoints.stored.checks import run_share
from checkpoints.stored.chunk_grid import Box
from checkpoints.stored.folder import Converted
from checkpoints.stored.names import Leaf, variable_path
from checkpoints.stored.source import Source, open_source, plan_reads
from kimi_jax.config import KimiConfig
from kimi_jax.config_json import fit_target
from kimi_jax.model.eagle import EagleHead, check_head
from kimi_jax.model.kimi import Kimi, check_heads
from pallas_kernels.formats import Dense, Weight
from sharding import SERVE, Partition, Rules

BATCH_BYTES = 2**28  # memory besides the model's; one projection of a layer's experts may be more: a batch of its own
READERS = 8  # a bucket answers many at once, and a disk too
_VISION = ("vision_tower.", "mm_projector.")
Model = TypeVar("Model", Kimi, EagleHead)


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
    """Loads the model in `path`, a folder or URL: a folder that `convert` wrote, or a published one of safetensors.

    Its arrays are sharded over `mesh` by `rules`, or on the default device without a mesh. `dtype` casts the
    parameters, None keeps them as stored, FP8 as bf16, since the model does not compute in FP8. INT4 scales stay bf16,
    and the router's bias, `A_log` and `dt_bias` are float32 in any case. With `verify`, every chunk of a converted
    checkpoint is first checked against its checksum, each process its share of them.

    `only` names parts of the tree, like "model.layers.3" or "lm_head": nothing else is read, and other parameters stay
    abstract (`jax.ShapeDtypeStruct`). Without any of its vision, ("model", "lm_head"), it is a model of text only.
    `progress` is called with the bytes that this process has read and their total.

    Raises FileNotFoundError where `path` holds no checkpoint, ConfigError or CheckpointError (both ValueErrors) where
    it is damaged or of another model than its config.json says, ValueError where `mesh` does not divide the heads or
    experts, or the model has no part that `only` names.
    """
    source = _open(path, verify)
    if not isinstance(source.contents.model, Kimi):
        raise CheckpointError(f"{source.folder}: is a draft head, not a model; checkpoints.load_head loads it")
    check_heads(source.contents.model.config, Partition(mesh, rules))
    leaves = _choose_leaves(source.contents.leaves, only)
    model = _fill(source, source.contents.model, leaves, mesh, dtype, rules, progress)
    model.config = dataclasses.replace(model.config, folder=str(source.folder))
    if not any(leaf.path.startswith(_VISION) for leaf in leaves):
        model.vision_tower = model.mm_projector = None
        model.config = dataclasses.replace(model.config, vision=None)
    return model


def load_head(
    path: str | Path | Remote,
    target: KimiConfig,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    verify: bool = False,
    progress: Progress | None = None,
) -> EagleHead:
    """Loads the Eagle3 draft head in `path`, converted or published, for a model of the configuration `target`.

    `mesh`, `dtype`, `verify` and `progress` are those of `load`. Raises what `load` raises, ConfigError for a head that
    was made for another model, CheckpointError for a checkpoint that is no head, and ValueError where `mesh` does not
    divide its heads.
    """
    source = _open(path, verify)
    head = source.contents.model
    if not isinstance(head, EagleHead):
        raise CheckpointError(f"{source.folder}: is a model, not a draft head; checkpoints.load loads it")
    config = fit_target(head.config, target, str(source.folder / "config.json"))
    check_head(config, Partition(mesh, SERVE))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(head))}  # not that of `t2d`
    leaves = [leaf for leaf in source.contents.leaves if variable_path(leaf.path) in paths]
    head = _fill(source, head, leaves, mesh, dtype, SERVE, progress)
    head.config = config
    return head


def _open(path: str | Path | Remote, verify: bool) -> Source:
    """Opens the checkpoint in `path`, and checks this process's share of its checksums where they are to `verify`."""
    folder = locate(path)
    source = open_source(folder)
    _ = source.contents  # raises for a folder whose parts contradict each other, before its chunks are read
    if verify:
        converted = source if isinstance(source, Converted) else Converted.open(folder)  # else raises
        run_share(converted, process_index=jax.process_index(), num_processes=jax.process_count())
    return source


def _fill(
    source: Source,
    model: Model,
    leaves: Sequence[Leaf],
    mesh: Mesh | None,
    dtype: jax.typing.DTypeLike | None,
    rules: Rules,
    progress: Progress | None,
) -> Model:
    """Reads `leaves` into a model or head of shapes; parameters of others stay shapes."""
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    placements = {leaf.path: _place(leaf, _sharding(leaf.axes, leaf.shape, mesh, rules)) for leaf in leaves}
    bytes_read, total = 0, sum(placement.nbytes for placement in placements.values())

    def out(path: str) -> Sharding:
        variable = variables[variable_path(path)]
        return _sharding(variable.get_metadata()["axes"], variable.shape, mesh, rules)

    for batch in _batches(leaves):
        found = {}
        with ThreadPoolExecutor(READERS) as pool:
            for leaf in batch:
                found[leaf.path] = _read(source, leaf, placements[leaf.path], pool)
                bytes_read += placements[leaf.path].nbytes
                if progress is not None:
                    progress(bytes_read, total)
        arrays = {leaf.path: _to_devices(leaf, placements[leaf.path], found.pop(leaf.path)) for leaf in batch}
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
                # what a bf16 model has in float32, or whole numbers, is so in any
                to_dtype = variable.dtype if variable.dtype != jnp.bfloat16 else dtype or leaf.dtype
                to = jax.ShapeDtypeStruct(variable.shape, to_dtype)
                values[leaf.path] = _dense(arrays.pop(leaf.path), to, out(leaf.path))
        jax.block_until_ready(values)
        for path, value in values.items():
            variables[variable_path(path)] = variables[variable_path(path)].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def _choose_leaves(leaves: Sequence[Leaf], only: Sequence[str] | None) -> list[Leaf]:
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


@dataclasses.dataclass(frozen=True)
class _Placement:
    """The place of a stored leaf on the mesh: its `sharding` by the rules; the `read_sharding` by which its bytes are
    read, so that no two processes read the same; the `boxes` that this process's devices read, and their bytes."""

    sharding: Sharding
    read_sharding: Sharding
    boxes: Mapping[jax.Device, Box]
    nbytes: int


def _place(leaf: Leaf, sharding: Sharding) -> _Placement:
    read_sharding = _split_replicas(sharding, leaf.shape)
    boxes: dict[jax.Device, Box] = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True))
        for device, index in read_sharding.addressable_devices_indices_map(leaf.shape).items()
    }
    elements = sum(math.prod(stop - start for start, stop in box) for box in set(boxes.values()))
    return _Placement(sharding, read_sharding, boxes, elements * leaf.dtype.itemsize)


def _read(source: Source, leaf: Leaf, placement: _Placement, pool: ThreadPoolExecutor) -> Mapping[Box, np.ndarray]:
    """Reads the boxes of a leaf that this process's devices need. Raises CheckpointError for a scale of MXFP4 that is
    255."""
    reads = plan_reads(source, leaf, set(placement.boxes.values()))
    for _ in pool.map(reads.fill, reads.ranges):
        pass
    if leaf.dtype == UINT8:  # (one pass over bytes; INT4's scales are not looked at)
        for box, scales in reads.arrays.items():
            if (bad := bad_scales(leaf.path, scales)) is not None:
                name = leaf.pattern.format(box[0][0] + bad[0])
                raise CheckpointError(f"{source.folder}: tensor {name} has a scale {bad[1]}")
    return reads.arrays


def _to_devices(leaf: Leaf, placement: _Placement, arrays: Mapping[Box, np.ndarray]) -> jax.Array:
    """Puts a leaf's boxes on their devices, and all-gathers replicas of which each process has read a part."""
    shards = [jax.device_put(arrays[box], device) for device, box in placement.boxes.items()]
    array = jax.make_array_from_single_device_arrays(leaf.shape, placement.read_sharding, shards)
    if placement.read_sharding == placement.sharding:
        return array
    # One at a time: with many under way, processes on CPU deadlock.
    return jax.block_until_ready(_all_gather(placement.sharding)(array))


def _split_replicas(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Returns `sharding` split over the mesh axes along which it replicates an array of `shape`, where they divide it,
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
def _all_gather(out: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=out)


def _dense(array: jax.Array, to: jax.ShapeDtypeStruct, out: Sharding) -> jax.Array:
    """Returns a stored floating-point leaf as the model has it: `A_log` [h], which releases have as [1, 1, h, 1] or
    padded at its end, and the dtype asked for."""
    if array.shape == to.shape and array.dtype == to.dtype:
        return array
    return _reshaped(out)(array, to.shape, to.dtype)


# Cached: one compiled function for all leaves of equal shape and sharding.
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
        lambda array, shape, dtype: _unpadded(array, math.prod(shape)).reshape(shape).astype(dtype),
        static_argnums=(1, 2),
        out_shardings=out,
    )


def _unpadded(array: jax.Array, size: int) -> jax.Array:
    """Returns the first `size` numbers of an array that has more, else the array itself."""
    return array if array.size == size else array.reshape(-1)[:size]


def _sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | None, rules: Rules) -> Sharding:
    if mesh is None:
        return jnp.zeros(()).sharding
    return NamedSharding(mesh, Partition(mesh, rules).spec(axes, shape))


def _batches(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """Yields leaves in batches of `BATCH_BYTES` or one weight, words always with their scales."""
    batch: list[Leaf] = []
    for _, group in groupby(sorted(leaves, key=lambda leaf: leaf.path), key=_weight):
        weight = list(group)
        if batch and sum(leaf.nbytes for leaf in (*batch, *weight)) > BATCH_BYTES:
            yield batch
            batch = []
        batch += weight
    yield batch


def _weight(leaf: Leaf) -> str:
    """Returns a name that a weight's words and scales share."""
    return leaf.path.rsplit(".", 1)[0]
