"""A published folder -> an Orbax checkpoint, streaming: memory stays near one chunk, whatever the model's size.

Arrays are zarr v3, uncompressed, one per stored leaf (`names`), written chunk by chunk through tensorstore in the order
of the shards' bytes; a chunk is one expert, so that its file is a published tensor's bytes verbatim. Orbax then writes
its tree metadata over them, and reads the result like any checkpoint of its own. Everything happens in a folder beside
the destination, named `*.partial`, which takes the destination's name when all is there, the manifest last.
"""

import dataclasses
import json
import os
import shutil
from collections import deque
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from checkpoints.names import PACKED, SHAPE, Contents, Leaf, contents
from checkpoints.safetensors import INDEX, Published
from kimi_jax import config_json

MANIFEST = "kimi_manifest.json"
CHUNK_BYTES = 32 * 2**20
PENDING_BYTES = 2 * CHUNK_BYTES
# Configuration, tokenizer, preprocessor, templates and the code that comes with them.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "LICENSE*")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did. `read_bytes` are the safetensors files' sizes, `written_bytes` the destination's."""

    destination: Path
    leaves: int
    tensors: int
    skipped: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    carried: tuple[str, ...]


def progress_bar() -> Progress:
    """A bar for `convert(..., progress=bar)`: bytes, rate and time left. A context manager."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns)


def convert(src: str | Path, dst: str | Path, *, progress: Progress | None = None) -> Report:
    """Writes the published checkpoint in folder `src` to a new folder `dst`, as stored: nothing is rounded.

    Restore it with `checkpoints.load`, or without any code of ours with `orbax.checkpoint.StandardCheckpointer`.
    Raises FileExistsError if `dst` is there, or a `dst.partial` that another conversion is writing or left; whatever
    `Published.open`, `config_json.from_folder` and `names.contents` refuse. On any error nothing is left behind.
    """
    src, dst = Path(src), Path(dst).absolute()
    if dst.exists():
        raise FileExistsError(f"{dst}: destination exists")
    published = Published.open(src)
    found = contents(config_json.from_folder(src), published)
    partial = dst.with_name(dst.name + ".partial")
    dst.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise FileExistsError(f"{partial}: another conversion is writing it or was killed; if so, remove it") from None
    try:
        _write_arrays(published, found.leaves, partial, progress)
        _write_metadata(found.leaves, partial)
        carried = _carry(src, partial)
        (partial / MANIFEST).write_text(json.dumps(_manifest(published, found), indent=1) + "\n")
        if dst.exists():  # renaming would replace an empty folder
            raise FileExistsError(f"{dst}: destination exists")
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return Report(
        destination=dst,
        leaves=len(found.leaves),
        tensors=sum(len(leaf.names) for leaf in found.leaves),
        skipped=found.skipped,
        read_bytes=sum(file.stat().st_size for file in published.files),
        written_bytes=sum(file.stat().st_size for file in dst.rglob("*") if file.is_file()),
        carried=carried,
    )


def chunk_shape(leaf: Leaf) -> tuple[int, ...]:
    """One expert, or the leading axis halved until a chunk has at most `CHUNK_BYTES`; it stays a divisor, so that no
    chunk straddles the shards of a mesh."""
    if leaf.stacked:
        return (1, *leaf.shape[1:])
    rows, row_bytes = leaf.shape[0], leaf.nbytes // max(leaf.shape[0], 1)
    while rows * row_bytes > CHUNK_BYTES and rows % 2 == 0:
        rows //= 2
    return (rows, *leaf.shape[1:])


def _write_arrays(published: Published, leaves: Sequence[Leaf], folder: Path, progress: Progress | None) -> None:
    places = {name: (leaf, i) for leaf in leaves for i, name in enumerate(leaf.names)}
    arrays: dict[str, ts.TensorStore] = {}
    with _Writer(progress, sum(leaf.nbytes for leaf in leaves)) as writer:
        for name in (name for name in published.tensors if name in places):
            leaf, expert = places[name]
            if leaf.path not in arrays:
                arrays[leaf.path] = _create(leaf, folder)
            if leaf.stacked:
                writer.write(arrays[leaf.path][expert], published.read(name))
                continue
            rows = chunk_shape(leaf)[0]
            for start in range(0, leaf.shape[0], rows):
                writer.write(arrays[leaf.path][start : start + rows], published.read(name, start, start + rows))


class _Writer:
    """Writes blocks in the background, never holding more than `PENDING_BYTES` of them besides the newest."""

    def __init__(self, progress: Progress | None, total: int):
        self.pending: deque[tuple[ts.WriteFutures, int]] = deque()
        self.pending_bytes = 0
        self.progress = progress
        self.task = progress.add_task("converting", total=total) if progress else None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error is None:
            self._settle(0)
        for write, _ in self.pending:  # nobody may still be writing into a folder that is about to be removed
            write.exception()

    def write(self, array: ts.TensorStore, block: np.ndarray) -> None:
        self.pending.append((array.write(block, can_reference_source_data_indefinitely=True), block.nbytes))
        self.pending_bytes += block.nbytes
        self._settle(PENDING_BYTES)

    def _settle(self, limit: int) -> None:
        while self.pending and self.pending_bytes > limit:
            write, nbytes = self.pending[0]
            write.result()
            self.pending.popleft()
            self.pending_bytes -= nbytes
            if self.progress and self.task is not None:
                self.progress.advance(self.task, nbytes)


def _create(leaf: Leaf, folder: Path) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder / leaf.path}{os.sep}"},
        "metadata": {
            "shape": leaf.shape,
            "data_type": leaf.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape(leaf)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,  # Orbax takes a chunk that is not there for a damaged checkpoint
    }
    return ts.open(spec, create=True).result()


class _AlreadyWritten:
    """A leaf whose array lies in its place."""


class _AlreadyWrittenHandler(ocp.type_handlers.NumpyHandler):
    """Has Orbax record such leaves as numpy arrays, which it restores without asking for a sharding."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        return []


def _write_metadata(leaves: Sequence[Leaf], folder: Path) -> None:
    """Orbax's own description of the tree: nested dictionaries along the dots of the paths."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (_AlreadyWritten, _AlreadyWrittenHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
    tree = nested({leaf.path: _AlreadyWritten() for leaf in leaves})
    handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(tree))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}: the tree as Orbax holds it."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _carry(src: Path, dst: Path) -> tuple[str, ...]:
    names = sorted({file.name for pattern in _CARRIED for file in src.glob(pattern) if file.is_file()} - {INDEX})
    for name in names:
        shutil.copyfile(src / name, dst / name)
    return tuple(names)


def _manifest(published: Published, found: Contents) -> dict[str, Any]:
    """What the arrays alone do not tell about the published files: names, files, and the dtype of each weight_shape."""

    def entry(leaf: Leaf) -> dict[str, Any]:
        values = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "published": leaf.pattern}
        if leaf.path.endswith(PACKED):
            first = published.tensors[leaf.names[0].removesuffix(PACKED) + SHAPE]
            values |= {SHAPE: list(leaf.weight_shape), f"{SHAPE}_dtype": first.dtype.name}
        return values

    return {
        "kimi_jax": version("kimi-jax"),
        "model_type": found.config.model_type,
        "files": {file.name: file.stat().st_size for file in published.files},
        "skipped": list(found.skipped),
        "leaves": {leaf.path: entry(leaf) for leaf in found.leaves},
    }
