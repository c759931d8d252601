"""Writes what stands beside the chunks of a checkpoint: zarr's and Orbax's metadata, and the files that go along."""

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from checkpoints.files.place import Place, size
from checkpoints.published.safetensors import INDEX, CheckpointError
from checkpoints.stored.chunk_grid import ChunkGrid
from checkpoints.stored.manifest import MANIFEST, Manifest
from kimi_jax import json_reader
from kimi_jax.printable import printable

CARRIED_BYTES = 100 * 2**20  # of one file; the largest that is published is a tokenizer of some 20 MB
# Configuration, tokenizer, preprocessor, templates and the code that comes with them.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "LICENSE*")
# The names of files that a checkpoint of either kind has of its own; stock zarr would take the last for the root's.
_NOT_CARRIED = (INDEX, MANIFEST, "zarr.json")


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
    handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(nested(dict.fromkeys(grids, _AlreadyWritten()))))
    orbax = [file.name for file in folder.glob("_*") if file.is_file() and not goes_along(file.name)]
    return [*(f"{path}/zarr.json" for path in grids), *sorted(orbax)]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}: the tree as Orbax holds it."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def goes_along(name: str) -> bool:
    """Says whether a file of this name, beside the tensors of a checkpoint, is carried along with them."""
    return (
        "/" not in name and name not in _NOT_CARRIED and any(fnmatch.fnmatchcase(name, pattern) for pattern in _CARRIED)
    )


def recorded(found: Manifest) -> dict[str, str] | None:
    """Returns the checksums that a manifest has of the files that go along, by name; None if it has none of files."""
    return None if found.files is None else {name: sha256 for name, sha256 in found.files.items() if goes_along(name)}


def carried(source: Place) -> dict[str, Place]:
    """Returns what the checkpoint in `source` has besides its tensors, by name.

    A link is followed within the folder, and in the cache of the Hugging Face Hub, where a snapshot is links, to the
    files of its own repository. Raises CheckpointError naming a link that leads elsewhere (what it leads to may not be
    meant to be published), what is no file (a FIFO, say), and a file of more than `CARRIED_BYTES`.
    """
    found = {file.name: file for pattern in _CARRIED for file in source.glob(pattern) if file.name not in _NOT_CARRIED}
    for name, file in sorted(found.items()):
        if file.is_dir():
            del found[name]
            continue
        if isinstance(file, Path):
            _check_link(source, file)
        if not file.is_file():
            raise CheckpointError(f"{printable(file)}: is no regular file, expected one; remove it")
        if (nbytes := size(file)) > CARRIED_BYTES:
            raise CheckpointError(f"{printable(file)}: has {nbytes:,} bytes, expected at most {CARRIED_BYTES:,}")
    return dict(sorted(found.items()))


def _check_link(folder: Place, file: Path) -> None:
    """Raises CheckpointError for a link out of `folder`, or to nothing."""
    if not file.is_symlink():
        return
    target, inside = Path(os.path.realpath(file)), Path(os.path.realpath(str(folder)))
    repository = inside.parents[1] if inside.parent.name == "snapshots" else None  # a cache of the Hub
    if not target.is_relative_to(inside) and not (repository and target.is_relative_to(repository / "blobs")):
        raise CheckpointError(
            f"{printable(file)}: is a link to {printable(target)}, outside of the folder; put a copy in its place"
        )
    if not target.exists():
        raise CheckpointError(f"{printable(file)}: is a link to {printable(target)}, which is not there")


def carry(
    source: Place,
    folder: Path,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    expected: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Copies what the checkpoint in `source` has besides its tensors, config.json as `config` changes it; gives the
    files' names.

    Raises what `carried` raises, and CheckpointError naming a file that is not as `expected`, the SHA-256 by name.
    """
    files = carried(source)
    if expected is not None and (names := sorted(files.keys() ^ expected.keys())):
        raise CheckpointError(f"{printable(source / names[0])}: changed: it {_came_or_went(names[0] in files)}")
    for name, file in files.items():
        data = file.read_bytes()
        if expected is not None and hashlib.sha256(data).hexdigest() != expected[name]:
            raise CheckpointError(f"{printable(file)}: changed: it is not the file that was converted")
        if config is not None and name == "config.json":
            values = config(json_reader.parse_object(data, str(file), error=CheckpointError))
            data = (json.dumps(values, indent=2) + "\n").encode()
        (folder / name).write_bytes(data)
    return tuple(files)


def _came_or_went(came: bool) -> str:
    return "was not there when the checkpoint was converted" if came else "was there when the checkpoint was converted"
