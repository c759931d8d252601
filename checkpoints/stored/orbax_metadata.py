"""Writes zarr's and Orbax's metadata beside chunks that are there already, so that stock Orbax restores them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from checkpoints.stored.chunk_grid import ChunkGrid
from checkpoints.stored.companions import is_companion


class _AlreadyWritten:
    """A leaf whose array lies in its place."""


class _AlreadyWrittenHandler(ocp.type_handlers.NumpyHandler):
    """Has Orbax record such leaves as numpy arrays, which it restores without asking for a sharding."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        return []


def write_array_metadata(grids: Mapping[str, ChunkGrid], folder: Path) -> list[str]:
    """Writes zarr.json of every leaf, and Orbax's own description of the tree: nested dictionaries along the dots of
    the paths. Returns the paths of these files in `folder`."""
    for path, grid in grids.items():
        store = {"driver": "file", "path": f"{folder / path}{os.sep}"}
        ts.open({"driver": "zarr3", "kvstore": store, "metadata": grid.metadata()}, open=True, create=True).result()
    registry = ocp.type_handlers.create_type_handler_registry(
        (_AlreadyWritten, _AlreadyWrittenHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
    handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(nest(dict.fromkeys(grids, _AlreadyWritten()))))
    orbax = [file.name for file in folder.glob("_*") if file.is_file() and not is_companion(file.name)]
    return [*(f"{path}/zarr.json" for path in grids), *sorted(orbax)]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of a flat mapping, {"a.b": x} -> {"a": {"b": x}}, in which Orbax writes it."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
