"""The manifest of a checkpoint that `convert` wrote: what its arrays do not tell, and checksums of all its bytes.

It says which source was converted. It has the cuts of every stored leaf, its published name and the SHA-256 of each
chunk's values; the SHA-256 of every other file; and last its own, of its text with zeros in that place. Besides its
values, a chunk's file has an index that follows from the cuts, so no byte of the folder is left out.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeGuard

import numpy as np

from checkpoints.files.place import Place, size
from checkpoints.published.endings import shape_name
from checkpoints.published.safetensors import DTYPES, CheckpointError, Published
from checkpoints.stored.chunk_grid import ChunkGrid
from checkpoints.stored.names import Leaf
from kimi_jax import json_reader
from kimi_jax.printable import printable
from pallas_kernels.formats import Int4

MANIFEST = "kimi_manifest.json"
JOURNAL = ".conversion"  # the folder of `convert`'s journal, in an unfinished checkpoint
FORMAT = 2  # format 1 had checksums of values only, and no number
_ZEROS = "0" * 64
_SHAPE = Int4.stored_shape
_SHA256 = re.compile("[0-9a-f]{64}")
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class LeafRecord:
    """One leaf in the manifest: `published` is its tensor's name, with {} for the expert's number; `sha256` has
    a checksum for each chunk by its number; `weight_shape` is published beside INT4 words, and stored here alone."""

    grid: ChunkGrid
    published: str
    sha256: tuple[str, ...]
    weight_shape: np.ndarray | None

    @property
    def stacked(self) -> bool:
        """True where the leading axis counts experts, one a chunk."""
        return "{}" in self.published


@dataclass(frozen=True)
class Manifest:
    """A manifest whose own checksum holds: `leaves` by path, the published tensors `skipped`, and the `source` that
    was converted. `files` has the SHA-256 of every file that is neither a chunk nor the manifest, by its path in the
    folder; None where the checkpoint was converted before there were such checksums."""

    leaves: Mapping[str, LeafRecord]
    files: Mapping[str, str] | None
    skipped: tuple[str, ...]
    source: Mapping[str, Any]


def describe(
    published: Published,
    model_type: str,
    source: Mapping[str, Any],
    skipped: Sequence[str],
    leaves: Iterable[Leaf],
    digests: Mapping[tuple[str, int], str],
    grids: Mapping[str, ChunkGrid],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the manifest of a conversion, to be written: an expert is one chunk, and its digest that of its tensor.
    `digests` are those of chunks by leaf and number, `files` those of other files by path."""

    def record(leaf: Leaf) -> dict[str, Any]:
        values = {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "published": leaf.pattern}
        if name := shape_name(leaf.names[0], leaf.dtype):
            first = published.tensors.get(name)
            values |= {_SHAPE: list(leaf.weight_shape), f"{_SHAPE}_dtype": first.dtype.name if first else "int32"}
        grid = grids[leaf.path]
        return values | {
            "chunk": list(grid.chunk),
            "part": list(grid.part),
            "sha256": [digests[leaf.path, number] for number in range(grid.chunks)],
        }

    return {
        "format": FORMAT,
        "kimi_jax": version("kimi-jax"),
        "model_type": model_type,
        "source": source,
        "skipped": list(skipped),
        "leaves": {leaf.path: record(leaf) for leaf in leaves},
        "files": dict(files),
    }


def encode(values: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a manifest: `values` as JSON, and after them the checksum of all of it."""
    text = json.dumps({**values, "sha256": _ZEROS}, indent=1) + "\n"
    before, _, after = text.rpartition(_ZEROS)
    return f"{before}{_digest(text.encode())}{after}".encode()


def read(folder: Place) -> Manifest:
    """Returns the manifest of the checkpoint in `folder`.

    Raises FileNotFoundError where there is none, CheckpointError where its own checksum differs, or where it is not
    what `convert` writes.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: holds no {MANIFEST}, so it is no checkpoint that `convert` finished")
    if (nbytes := size(file)) > json_reader.MAX_BYTES:
        raise CheckpointError(f"{file}: has {nbytes:,} bytes, expected at most {json_reader.MAX_BYTES:,}")
    data = file.read_bytes()
    values = json_reader.parse_object(data, str(file), error=CheckpointError)
    older = not values.keys() & {"format", "files", "sha256"}
    if not older:
        _check_own(file, data, values)
    try:
        leaves = {path: _record(path, value) for path, value in _object(values, "leaves").items()}
        files = None if older else _files(_object(values, "files"))
        skipped, source = values["skipped"], _object(values, "source")
        if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
            raise ValueError(f"skipped is {skipped!r}, expected names")
    except KeyError as error:
        raise CheckpointError(f"{file}: is damaged: it has no {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is damaged: {printable(error)}") from None
    return Manifest(leaves, files, tuple(skipped), source)


def _check_own(file: Place, data: bytes, values: Mapping[str, Any]) -> None:
    own = values.get("sha256")
    if not _is_digest(own) or _digest(data.replace(own.encode(), _ZEROS.encode())) != own:
        raise CheckpointError(f"{file}: is damaged: its checksum, of itself, differs")
    if (found := values.get("format")) != FORMAT:
        raise CheckpointError(f"{file}: has format {printable(found)}, expected {FORMAT}; it needs another kimi-jax")


def _record(path: str, value: Any) -> LeafRecord:
    """Returns the checked record of a leaf. Raises ValueError, and KeyError for a key that is not there."""
    if not re.fullmatch(r"\w[\w.]*", path, re.ASCII) or not isinstance(value, dict):
        raise ValueError(f"leaves: {path!r} is {value!r}, expected a leaf's path and an object")
    shape, chunk, part = (_numbers(path, key, value[key]) for key in ("shape", "chunk", "part"))
    dtype, published, digests = value["dtype"], value["published"], value["sha256"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"leaf {path} has dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if not len(shape) == len(chunk) == len(part):
        raise ValueError(f"leaf {path} has shape {shape}, chunk {chunk} and part {part}, expected as many numbers")
    if any(s % c or c % p for s, c, p in zip(shape, chunk, part, strict=True)):
        raise ValueError(f"leaf {path}: chunk {chunk} or part {part} does not divide shape {shape}")
    grid = ChunkGrid(shape, _DTYPES[dtype], chunk, part)
    if not isinstance(published, str) or set("{}") & set(published.replace("{}", "", 1)):
        raise ValueError(f"leaf {path} is published as {published!r}, expected a name with {{}} once at the most")
    if not isinstance(digests, list) or not all(map(_is_digest, digests)):
        raise ValueError(f"leaf {path} has checksums that are none")
    if len(digests) != grid.chunks:
        raise ValueError(f"{published} has {len(digests)} checksums, expected {grid.chunks}")
    record = LeafRecord(grid, published, tuple(digests), _weight_shape(path, value, grid))
    if record.stacked and (not shape or chunk != (1, *shape[1:])):
        raise ValueError(f"leaf {path} has shape {shape} and chunk {chunk}, expected an expert a chunk")
    return record


def _weight_shape(path: str, value: Mapping[str, Any], grid: ChunkGrid) -> np.ndarray | None:
    if shape_name(path, grid.dtype) is None:
        return None
    found, dtype = _numbers(path, _SHAPE, value[_SHAPE]), value[f"{_SHAPE}_dtype"]
    if len(grid.shape) != 3 or found != Int4.stored[0].weight_shape(grid.shape)[1:]:
        raise ValueError(f"leaf {path} has {_SHAPE} {found}, which does not fit its shape {grid.shape}")
    if dtype not in ("int32", "int64"):
        raise ValueError(f"leaf {path} has {_SHAPE}_dtype {dtype!r}, expected int32 or int64")
    return np.array(found, dtype)


def _numbers(path: str, key: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 < value < 2**48 for value in values):
        raise ValueError(f"leaf {path} has {key} {values!r}, expected numbers from 1")
    return tuple(values)


def _files(values: Mapping[str, Any]) -> dict[str, str]:
    for path, digest in values.items():
        if not _is_digest(digest) or path.startswith("/") or set(path.split("/")) & {"", ".", ".."}:
            raise ValueError(f"files: {path!r} is {digest!r}, expected a path in the folder and its checksum")
    return dict(values)


def _object(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(values[key], dict):
        raise ValueError(f"{key} is {values[key]!r}, expected an object")
    return dict(values[key])


def _is_digest(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
