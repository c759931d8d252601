"""An Orbax checkpoint of ours read as what it was made of: the published tensors, by name.

Chunks are read as files (`layout`), without Orbax: an expert is one chunk, any other tensor rows of one or several.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints.journal import digest
from checkpoints.layout import Layout
from checkpoints.metadata import MANIFEST
from checkpoints.names import PACKED, SHAPE
from checkpoints.reading import Place, Remote, at, read_into, size
from checkpoints.safetensors import CheckpointError, Tensor


@dataclass(frozen=True)
class Chunk:
    """One file of the array in `folder`: all of the published tensor `name`, or its rows from `row` on."""

    name: str
    folder: Place
    number: int
    layout: Layout
    stacked: bool
    sha256: str

    @property
    def file(self) -> Place:
        return self.folder / self.layout.file(self.number)

    @property
    def row(self) -> int:
        return 0 if self.stacked or not self.layout.grid else self.layout.index(self.number)[0] * self.layout.chunk[0]

    def read(self, *, check: bool = False) -> np.ndarray:
        """The tensor's rows. Raises CheckpointError naming file and tensor where the file is not there or cut short,
        and on `check` where its values are not those that were converted."""
        data, file = np.empty(self.layout.file_bytes, np.uint8), self.file
        if not file.is_file():
            raise CheckpointError(f"{file}: is not there; it holds tensor {self.name}")
        if (found := size(file)) != data.nbytes or read_into(file, 0, data.data) != data.nbytes:
            raise CheckpointError(f"{file}: has {found} bytes, expected {data.nbytes}; it holds tensor {self.name}")
        array = self.layout.decode(data)
        if check and digest(array) != self.sha256:
            raise CheckpointError(f"{file}: tensor {self.name} is not what was converted: its checksum differs")
        return array[0] if self.stacked else array

    @property
    def nbytes(self) -> int:
        """Memory that reading takes: the file, and the chunk put together."""
        return 2 * self.layout.file_bytes


@dataclass(frozen=True)
class Converted:
    """A folder that `convert` wrote. `tensors` are the published ones with their names, shapes and dtypes, in no order
    of files; `Tensor.file` is the array's folder."""

    folder: Place
    tensors: Mapping[str, Tensor]
    chunks: Mapping[str, tuple[Chunk, ...]]
    weight_shapes: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, folder: str | Path | Remote) -> "Converted":
        """Raises FileNotFoundError where `folder` has no manifest of ours, CheckpointError where it is damaged."""
        folder = at(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder}: holds no {MANIFEST}, so it is no checkpoint that `convert` finished")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            found = [_chunk for path, entry in manifest["leaves"].items() for _chunk in _chunks(folder / path, entry)]
            shapes = dict(pair for entry in manifest["leaves"].values() for pair in _weight_shapes(entry))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: is damaged: {error!r}") from None
        tensors: dict[str, Tensor] = {}
        chunks: dict[str, tuple[Chunk, ...]] = {}
        for chunk in found:
            lay = chunk.layout
            shape = lay.shape[1:] if chunk.stacked else lay.shape
            tensors[chunk.name] = Tensor(chunk.name, lay.dtype, shape, chunk.folder, 0)
            chunks[chunk.name] = (*chunks.get(chunk.name, ()), chunk)
        for name, value in shapes.items():
            tensors[name] = Tensor(name, value.dtype, value.shape, folder / MANIFEST, 0)
        return cls(folder, tensors, chunks, shapes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tensor `name`, or its rows `start` to `stop`, as `Published.read`. Every chunk that they touch is read whole.

        Raises what `Chunk.read` raises.
        """
        if name in self.weight_shapes:
            return self.weight_shapes[name][start:stop]
        parts = []
        for chunk in self.chunks[name]:
            rows = chunk.layout.chunk[1 if chunk.stacked else 0] if self.tensors[name].shape else 1
            end = chunk.row + rows if stop is None else stop
            if chunk.row < end and start < chunk.row + rows:
                array = chunk.read()
                whole = start <= chunk.row and end >= chunk.row + rows
                parts.append(array if whole else array[max(start - chunk.row, 0) : end - chunk.row])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def layout_of(entry: Mapping[str, Any]) -> Layout:
    """How a leaf lies, by its entry in the manifest."""
    shape, chunk, part = (tuple(entry[key]) for key in ("shape", "chunk", "part"))
    return Layout(shape, jnp.dtype(entry["dtype"]), chunk, part)


def _chunks(folder: Place, entry: Mapping[str, Any]) -> Iterator[Chunk]:
    stacked, pattern, digests = "{}" in entry["published"], entry["published"], entry["sha256"]
    layout = layout_of(entry)
    if len(digests) != layout.chunks:
        raise ValueError(f"{pattern} has {len(digests)} checksums, expected {layout.chunks}")
    for number, sha256 in enumerate(digests):
        yield Chunk(pattern.format(number) if stacked else pattern, folder, number, layout, stacked, sha256)


def _weight_shapes(entry: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """What is published beside INT4 words, and stored in the manifest alone."""
    if SHAPE in entry:
        pattern = entry["published"].removesuffix(PACKED) + SHAPE
        value = np.array(entry[SHAPE], entry[f"{SHAPE}_dtype"])
        yield from ((pattern.format(expert), value) for expert in range(entry["shape"][0]))
