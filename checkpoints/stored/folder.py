"""A folder that `convert` wrote, as its manifest describes it: everything that reads one reads it here.

Its chunks are read as files (`chunk_grid`), without Orbax: as parts of stored leaves (loading), or as the published
tensors that they were made of (exporting, verifying, comparing).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from checkpoints.files.place import Place, Remote, locate
from checkpoints.published.endings import packed_format, shape_name
from checkpoints.published.safetensors import CheckpointError, Tensor
from checkpoints.published.sizes import check_sizes
from checkpoints.stored import manifest
from checkpoints.stored.chunk_file import ChunkFile
from checkpoints.stored.chunk_grid import Box, ByteRange
from checkpoints.stored.eagle import check_map, expect
from checkpoints.stored.manifest import MANIFEST, LeafRecord, Manifest
from checkpoints.stored.names import (
    Contents,
    Leaf,
    abstract_of_form,
    as_stored,
    stored_leaves,
    with_fp8,
    with_prefix,
)
from kimi_jax import config_json
from kimi_jax.config import EagleConfig, KimiConfig
from kimi_jax.families import prefix_of
from kimi_jax.model.eagle import EagleHead
from kimi_jax.model.kimi import Kimi
from kimi_jax.printable import printable


@dataclass(frozen=True)
class Converted:
    """A converted folder and its manifest. What follows from these is made, and checked, when it is first asked for."""

    folder: Place
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path | Remote) -> "Converted":
        """Reads the manifest in `folder`, a path or URL.

        Raises FileNotFoundError where there is none, CheckpointError where its own checksum differs or where it is not
        what `convert` writes.
        """
        place = locate(folder)
        return cls(place, manifest.read(place))

    @cached_property
    def contents(self) -> Contents:
        """The model, leaves and tensors left out, once the manifest agrees with config.json and the rules of `names`.

        Raises CheckpointError naming the leaf that is missing, not of this model, or of another shape, dtype or
        published name than these give; ConfigError for config.json.
        """
        records = self.manifest.leaves
        config = config_json.read_config(self.folder)
        model, leaves = self._expected(config)
        expected = {leaf.path: leaf for leaf in leaves}
        if wrong := sorted(expected.keys() ^ records.keys()):
            first = ", ".join(printable(path) for path in wrong[:3])
            raise CheckpointError(f"{self.folder}: {len(wrong)} leaves are missing or not of this model: {first}")
        found = []
        for path, record in records.items():
            leaf = expected[path]
            if record.published != leaf.pattern:
                name = printable(record.published)
                raise CheckpointError(
                    f"{self.folder / MANIFEST}: leaf {path} is published as {name}, expected {leaf.pattern}"
                )
            found.append(as_stored(leaf, record.grid.shape, record.grid.dtype, f"{self.folder}: leaf {path}"))
        if isinstance(model, EagleHead) and model.config.vocab_map:
            d2t, *t2d = (
                np.concatenate([chunk.read() for chunk in self.chunks[name]])
                for name in ("d2t", "t2d")
                if name in records
            )
            check_map(model.config, d2t, t2d[0] if t2d else None, str(self.folder))
        return Contents(model, tuple(found), self.manifest.skipped)

    def _expected(self, config: KimiConfig | EagleConfig) -> tuple[Kimi | EagleHead, list[Leaf]]:
        """Returns the abstract model or head that the manifest's leaves are of, and the leaves that it must have."""
        records = self.manifest.leaves
        names = [record.published for record in records.values()]
        if isinstance(config, EagleConfig):
            return expect(config, names)
        check_sizes(config, {path: record.grid.shape for path, record in records.items()}, str(self.folder))
        model = abstract_of_form(config, packed_format((path, record.grid.dtype) for path, record in records.items()))
        prefix = prefix_of(names)
        leaves = with_fp8(stored_leaves(model), lambda leaf: leaf.path, records)
        return model, [with_prefix(leaf, prefix) for leaf in leaves]

    def ranges(self, leaf: Leaf, box: Box) -> Iterator[ByteRange]:
        """Yields the byte ranges that part `box` of a stored leaf needs."""
        grid = self.manifest.leaves[leaf.path].grid
        return grid.ranges(box, self.folder / leaf.path, f"{self.folder}: leaf {leaf.path}")

    @cached_property
    def chunks(self) -> Mapping[str, tuple[ChunkFile, ...]]:
        """The chunks' files of each published tensor, by its name. Raises CheckpointError for a tensor of two
        leaves."""
        chunks: dict[str, tuple[ChunkFile, ...]] = {}
        for path, record in self.manifest.leaves.items():
            of_leaf: dict[str, tuple[ChunkFile, ...]] = {}
            for chunk in _chunks(self.folder / path, record):
                of_leaf[chunk.name] = (*of_leaf.get(chunk.name, ()), chunk)
            if twice := min(of_leaf.keys() & chunks.keys(), default=""):
                raise CheckpointError(f"{self.folder / MANIFEST}: two leaves hold tensor {printable(twice)}")
            chunks |= of_leaf
        return chunks

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The published tensors with their names, shapes and dtypes, in no order of files; `Tensor.file` is the
        array's folder, or the manifest. Raises what `contents` raises."""
        tensors = {}
        for leaf in self.contents.leaves:
            shape = leaf.shape[1:] if leaf.stacked else leaf.shape
            for name in leaf.names:
                tensors[name] = Tensor(name, leaf.dtype, shape, self.folder / leaf.path, 0)
        for name, value in self.weight_shapes.items():
            tensors[name] = Tensor(name, value.dtype, value.shape, self.folder / MANIFEST, 0)
        return tensors

    @cached_property
    def weight_shapes(self) -> Mapping[str, np.ndarray]:
        """The tensors that are published beside INT4 words, and stored in the manifest alone."""
        shapes: dict[str, np.ndarray] = {}
        for record in self.manifest.leaves.values():
            shapes |= _weight_shapes(record)
        return shapes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns tensor `name`, or its rows `start` to `stop`, like `Published.read`. Every chunk that they touch is
        read whole.

        Raises what `ChunkFile.read` raises.
        """
        if name in self.weight_shapes:
            return self.weight_shapes[name][start:stop]
        arrays = []
        for chunk in self.chunks[name]:
            rows = chunk.grid.chunk[1 if chunk.stacked else 0] if self.tensors[name].shape else 1
            end = chunk.row + rows if stop is None else stop
            if chunk.row < end and start < chunk.row + rows:
                array = chunk.read()
                whole = start <= chunk.row and end >= chunk.row + rows
                arrays.append(array if whole else array[max(start - chunk.row, 0) : end - chunk.row])
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _chunks(folder: Place, record: LeafRecord) -> Iterator[ChunkFile]:
    for number, sha256 in enumerate(record.sha256):
        name = record.published.format(number) if record.stacked else record.published
        yield ChunkFile(name, folder, number, record.grid, record.stacked, sha256)


def _weight_shapes(record: LeafRecord) -> dict[str, np.ndarray]:
    """Returns what is published beside INT4 words, and stored in the manifest alone."""
    if record.weight_shape is None:
        return {}
    pattern = shape_name(record.published, record.grid.dtype)
    assert pattern is not None
    return {pattern.format(expert): record.weight_shape for expert in range(record.grid.shape[0])}
