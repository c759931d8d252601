"""An Orbax checkpoint of ours read as what it was made of: the published tensors, by name.

Chunks are read as files (`layout`), without Orbax: an expert is one chunk, any other tensor rows of one or several.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints.published.endings import shape_name
from checkpoints.published.reading import Place, Remote, at, read_into, size
from checkpoints.published.safetensors import CheckpointError, Tensor
from checkpoints.stored import manifest
from checkpoints.stored.journal import digest
from checkpoints.stored.layout import Layout
from checkpoints.stored.manifest import MANIFEST, Entry, Manifest
from kimi_jax.printable import printable


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
        """Returns the tensor's rows. Raises CheckpointError naming file and tensor where the file is not there, cut
        short, or has another index of its parts, and on `check` where its values are not those that were converted."""
        file, expected = self.file, self.layout.file_bytes
        if not file.is_file():
            raise CheckpointError(f"{file}: is not there; it holds tensor {self.name}")
        found = size(file)
        data = np.empty(expected if found == expected else 0, np.uint8)
        if found != expected or read_into(file, 0, data.data) != expected:
            raise CheckpointError(f"{file}: has {found} bytes, expected {expected}; it holds tensor {self.name}")
        if not np.array_equal(data[self.layout.chunk_bytes :], self.layout.footer):
            raise CheckpointError(f"{file}: its index of parts is damaged; it holds tensor {self.name}")
        array = self.layout.decode(data)
        if check and digest(array) != self.sha256:
            raise CheckpointError(f"{file}: tensor {self.name} is not what was converted: its checksum differs")
        return array[0] if self.stacked else array

    def check(self) -> None:
        """Raises what `read` raises, of a file that is not what was converted."""
        self.read(check=True)

    @property
    def nbytes(self) -> int:
        """Memory that reading takes: the file, and the chunk put together."""
        return 2 * self.layout.file_bytes


@dataclass(frozen=True)
class Converted:
    """A folder that `convert` wrote. `tensors` are the published ones with their names, shapes and dtypes, in no order
    of files; `Tensor.file` is the array's folder."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    chunks: Mapping[str, tuple[Chunk, ...]]
    weight_shapes: Mapping[str, np.ndarray]

    @classmethod
    def open(cls, folder: str | Path | Remote) -> "Converted":
        """Returns the checkpoint in `folder`, its manifest whole and of the model that config.json describes.

        Raises what `manifest.read` and `Manifest.contents` raise.
        """
        found = manifest.read(at(folder))
        found.contents()
        return cls.of(found)

    @classmethod
    def of(cls, manifest: Manifest) -> "Converted":
        """Returns what `manifest` speaks of, whatever config.json says. Raises CheckpointError for a tensor of two
        leaves."""
        tensors: dict[str, Tensor] = {}
        chunks: dict[str, tuple[Chunk, ...]] = {}
        shapes: dict[str, np.ndarray] = {}
        for path, entry in manifest.leaves.items():
            folder, lay = manifest.folder / path, entry.layout
            names = {chunk.name for chunk in _chunks(folder, entry)}
            if twice := min(names & tensors.keys(), default=""):
                raise CheckpointError(f"{manifest.folder / MANIFEST}: two leaves hold tensor {printable(twice)}")
            for chunk in _chunks(folder, entry):
                shape = lay.shape[1:] if chunk.stacked else lay.shape
                tensors[chunk.name] = Tensor(chunk.name, lay.dtype, shape, folder, 0)
                chunks[chunk.name] = (*chunks.get(chunk.name, ()), chunk)
            shapes |= _weight_shapes(entry)
        for name, value in shapes.items():
            tensors[name] = Tensor(name, value.dtype, value.shape, manifest.folder / MANIFEST, 0)
        return cls(manifest, tensors, chunks, shapes)

    @property
    def folder(self) -> Place:
        return self.manifest.folder

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


def _chunks(folder: Place, entry: Entry) -> Iterator[Chunk]:
    for number, sha256 in enumerate(entry.sha256):
        name = entry.published.format(number) if entry.stacked else entry.published
        yield Chunk(name, folder, number, entry.layout, entry.stacked, sha256)


def _weight_shapes(entry: Entry) -> dict[str, np.ndarray]:
    """Returns what is published beside INT4 words, and stored in the manifest alone."""
    pattern = shape_name(entry.published)
    if entry.weight_shape is None or pattern is None:
        return {}
    return {pattern.format(expert): entry.weight_shape for expert in range(entry.layout.shape[0])}
