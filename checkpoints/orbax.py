"""Fills a `Kimi` from a checkpoint, sharded: an Orbax checkpoint of ours, or a published folder directly.

Each process reads only the bytes of its own shards, a bounded batch of leaves at a time, and what is stored becomes
what the model computes with on the device: INT4 words the kernels' codes, dense experts [in, out].
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from checkpoints.convert import MANIFEST, nested
from checkpoints.names import (
    PACKED,
    SCALE,
    Contents,
    Leaf,
    abstract_of_form,
    as_stored,
    contents,
    stored,
    variable_path,
)
from checkpoints.safetensors import CheckpointError, Published
from kimi_jax import config_json
from kimi_jax.model.kimi import Kimi
from pallas_kernels import unpack_int4
from sharding import spec

BATCH_BYTES = 2**28  # held besides the model; one projection of a layer's experts may be more, and then goes alone


def load(path: str | Path, mesh: Mesh | None = None, dtype: jax.typing.DTypeLike | None = None) -> Kimi:
    """The model in folder `path`: an Orbax checkpoint of ours, or a published folder of safetensors.

    Its arrays lie on `mesh` as `sharding.rules` says, on the default device where there is none. `dtype` casts the
    parameters, None keeps them as stored; INT4 scales stay bf16 and the router's bias, `A_log` and `dt_bias` are
    float32 in any case.
    Raises FileNotFoundError where `path` holds no checkpoint, ConfigError or CheckpointError (both ValueErrors) where
    it is damaged or of another model than its config.json says, ValueError where `mesh` does not divide the experts.
    """
    source = open_checkpoint(path)
    graphdef, state = nnx.split(source.contents.model)
    variables = dict(nnx.to_flat_state(state))

    def out(path: str) -> Sharding:
        variable = variables[variable_path(path)]
        return _sharding(variable.get_metadata()["axes"], variable.shape, mesh)

    for batch in _batches(source.contents.leaves):
        arrays = source.arrays(batch, [_sharding(leaf.axes, leaf.shape, mesh) for leaf in batch])
        values: dict[str, jax.Array] = {}
        for leaf in batch:
            if leaf.path.endswith(PACKED):
                scale = leaf.path.replace(PACKED, SCALE)
                values[leaf.path], values[scale] = _unpack(out(leaf.path), out(scale))(
                    arrays.pop(leaf.path), arrays.pop(scale)
                )
            elif not leaf.path.endswith(SCALE):  # which goes with its words
                variable = variables[variable_path(leaf.path)]
                # what a bf16 model has in float32 is float32 in any
                to_dtype = variable.dtype if variable.dtype == jnp.float32 else dtype or leaf.dtype
                to = jax.ShapeDtypeStruct(variable.shape, to_dtype)
                values[leaf.path] = _dense(arrays.pop(leaf.path), to, out(leaf.path))
        jax.block_until_ready(values)
        for path, value in values.items():
            variables[variable_path(path)] = variables[variable_path(path)].replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(variables))


def _dense(array: jax.Array, to: jax.ShapeDtypeStruct, out: Sharding) -> jax.Array:
    """A stored floating-point leaf as the model has it: `A_log` [h], and the dtype asked for."""
    if array.shape == to.shape and array.dtype == to.dtype:
        return array
    return _reshaped(out)(array, to.shape, to.dtype)


# One compiled function for all leaves that are alike.
@functools.cache
def _unpack(codes: Sharding, scales: Sharding) -> Any:
    return jax.jit(unpack_int4, out_shardings=(codes, scales))


@functools.cache
def _reshaped(out: Sharding) -> Any:
    return jax.jit(
        lambda array, shape, dtype: array.reshape(shape).astype(dtype), static_argnums=(1, 2), out_shardings=out
    )


def _sharding(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | None) -> Sharding:
    return jnp.zeros(()).sharding if mesh is None else NamedSharding(mesh, spec(axes, shape, mesh))


def _batches(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    """Leaves in batches of `BATCH_BYTES` or one weight, words always with their scales."""
    batch: list[Leaf] = []
    for _, group in groupby(sorted(leaves, key=lambda leaf: leaf.path), key=lambda leaf: leaf.path.rsplit(".", 1)[0]):
        weight = list(group)
        if batch and sum(leaf.nbytes for leaf in (*batch, *weight)) > BATCH_BYTES:
            yield batch
            batch = []
        batch += weight
    yield batch


@dataclasses.dataclass(frozen=True)
class PublishedSource:
    """A published folder, read by byte ranges."""

    contents: Contents
    published: Published

    def arrays(self, leaves: Sequence[Leaf], shardings: Sequence[Sharding]) -> dict[str, jax.Array]:
        """Stored leaves by path, each as its sharding says; only the bytes of this process's shards are read."""
        return {leaf.path: self._array(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)}

    def _array(self, leaf: Leaf, sharding: Sharding) -> jax.Array:
        blocks: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

        @functools.cache
        def rows(start: int, stop: int) -> np.ndarray:  # shards of columns have them in common
            return self.published.read(leaf.pattern, start, stop)

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            # replicas ask for the same block one after another
            key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
            if key not in blocks:
                lead, *rest = index
                blocks[key] = self._experts(leaf, lead, *rest) if leaf.stacked else rows(*key[0][:2])[:, *rest]
            return blocks[key]

        return jax.make_array_from_callback(leaf.shape, sharding, block)

    def _experts(self, leaf: Leaf, lead: slice, *rest: slice) -> np.ndarray:
        rows = range(leaf.shape[0])[lead]
        first = self.published.read(leaf.names[rows.start])[*rest]
        out = np.empty((len(rows), *first.shape), first.dtype)
        out[0] = first
        for i, expert in enumerate(rows[1:], 1):
            out[i] = self.published.read(leaf.names[expert])[*rest]
        return out


@dataclasses.dataclass(frozen=True)
class OrbaxSource:
    """A checkpoint that `convert` wrote."""

    contents: Contents
    folder: Path

    def arrays(self, leaves: Sequence[Leaf], shardings: Sequence[Sharding]) -> dict[str, jax.Array]:
        """As `PublishedSource.arrays`, through Orbax."""
        item = nested(
            {
                leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for leaf, sharding in zip(leaves, shardings, strict=True)
            }
        )
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        try:
            tree = ocp.PyTreeCheckpointHandler().restore(epath.Path(self.folder), args=args)
        except Exception as error:  # Orbax raises no narrower class for a chunk that is not there
            damaged = [leaf.path for leaf in leaves if f"{self.folder / leaf.path}/" in str(error)]
            if not damaged:
                raise
            raise CheckpointError(f"{self.folder}: leaf {damaged[0]} is damaged or not there") from error
        return {leaf.path: functools.reduce(lambda node, key: node[key], leaf.path.split("."), tree) for leaf in leaves}


def open_checkpoint(path: str | Path) -> PublishedSource | OrbaxSource:
    """The checkpoint of either kind in folder `path`, its contents checked by name, shape and dtype.

    Raises FileNotFoundError where there is none, and what `load` raises for one that does not fit its config.json.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if not (path / MANIFEST).is_file():
        published = Published.open(path)
        return PublishedSource(contents(config_json.from_folder(path), published), published)
    manifest = json.loads((path / MANIFEST).read_text())
    entries = manifest["leaves"]
    model = abstract_of_form(config_json.from_folder(path), entries)
    expected = {leaf.path: leaf for leaf in stored(model)}
    if wrong := sorted(expected.keys() ^ entries.keys()):
        raise CheckpointError(f"{path}: {len(wrong)} leaves are missing or not of this model: {', '.join(wrong[:3])}")
    leaves = []
    for name, entry in entries.items():
        leaf = dataclasses.replace(expected[name], pattern=entry["published"])
        leaves.append(as_stored(leaf, tuple(entry["shape"]), jnp.dtype(entry["dtype"]), f"{path}: leaf {name}"))
    return OrbaxSource(Contents(model, tuple(leaves), tuple(manifest["skipped"])), path)
