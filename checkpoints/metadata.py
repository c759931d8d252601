"""What makes written chunks a checkpoint: zarr's and Orbax's metadata, our manifest, and the files that go along."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from checkpoints.layout import Layout
from checkpoints.names import PACKED, SHAPE, Leaf
from checkpoints.reading import Place
from checkpoints.safetensors import INDEX, Published

MANIFEST = "kimi_manifest.json"
# Configuration, tokenizer, preprocessor, templates and the code that comes with them.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "LICENSE*")


class _AlreadyWritten:
    """A leaf whose array lies in its place."""


class _AlreadyWrittenHandler(ocp.type_handlers.NumpyHandler):
    """Has Orbax record such leaves as numpy arrays, which it restores without asking for a sharding."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        return []


def write_array_metadata(layouts: Mapping[str, Layout], folder: Path) -> None:
    """zarr.json of every leaf, and Orbax's own description of the tree: nested dictionaries along the dots of the
    paths."""
    for path, layout in layouts.items():
        store = {"driver": "file", "path": f"{folder / path}{os.sep}"}
        ts.open({"driver": "zarr3", "kvstore": store, "metadata": layout.metadata()}, open=True, create=True).result()
    registry = ocp.type_handlers.create_type_handler_registry(
        (_AlreadyWritten, _AlreadyWrittenHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
    handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(nested(dict.fromkeys(layouts, _AlreadyWritten()))))


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


def carry(
    source: Place, folder: Path, config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> tuple[str, ...]:
    """Copies what the checkpoint in `source` has besides its tensors, config.json as `config` changes it; gives the
    files' names."""
    found = {file.name: file for pattern in _CARRIED for file in source.glob(pattern) if file.is_file()}
    for name in (INDEX, MANIFEST):
        found.pop(name, None)
    for name, file in found.items():
        (folder / name).write_bytes(file.read_bytes())
    if config is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text())), indent=2) + "\n")
    return tuple(sorted(found))


def manifest(
    published: Published,
    model_type: str,
    source: Mapping[str, Any],
    skipped: Sequence[str],
    leaves: Iterable[Leaf],
    digests: Mapping[tuple[str, int], str],
    layouts: Mapping[str, Layout],
) -> dict[str, Any]:
    """What the arrays alone do not tell: where they come from, the published names, the dtype of each weight_shape, and
    the SHA-256 of each chunk's values by its number. An expert is one chunk, and its digest that of its tensor."""

    def entry(leaf: Leaf) -> dict[str, Any]:
        values = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "published": leaf.pattern}
        if leaf.path.endswith(PACKED):
            first = published.tensors.get(leaf.names[0].removesuffix(PACKED) + SHAPE)
            values |= {SHAPE: list(leaf.weight_shape), f"{SHAPE}_dtype": first.dtype.name if first else "int32"}
        layout = layouts[leaf.path]
        return values | {
            "chunk": list(layout.chunk),
            "part": list(layout.part),
            "sha256": [digests[leaf.path, number] for number in range(layout.chunks)],
        }

    return {
        "kimi_jax": version("kimi-jax"),
        "model_type": model_type,
        "source": source,
        "skipped": list(skipped),
        "leaves": {leaf.path: entry(leaf) for leaf in leaves},
    }


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing, whatever happens in between."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    fsync(new)
    new.rename(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is safe from a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
