"""Checkpoints of either kind as stored leaves, any part of which is read by the byte ranges that it needs."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from checkpoints.files.place import Place, Remote, at, read_into
from checkpoints.files.writing import aligned
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.published.spellings import open_published
from checkpoints.stored import manifest
from checkpoints.stored.chunk_grid import Box, ChunkGrid
from checkpoints.stored.manifest import MANIFEST
from checkpoints.stored.names import Contents, Leaf, contents
from kimi_jax import config_json

# What fills some arrays, in any order and by several threads.
Reads = Iterator[Callable[[], object]]
# An array, and the part that it is of what is read.
Cut = tuple[np.ndarray, tuple[slice, ...]]


@dataclasses.dataclass(frozen=True)
class PublishedSource:
    """A published folder. What is asked for is read as whole rows of its tensors."""

    contents: Contents
    published: Published

    def blocks(self, leaf: Leaf, boxes: Iterable[Box]) -> tuple[dict[Box, np.ndarray], Reads]:
        """Arrays for parts of a leaf, and what has to be called to fill them."""
        rest = 2 if leaf.stacked else 1  # columns begin here
        columns = tuple((0, size) for size in leaf.shape[rest:])
        rows = {box: (*box[:rest], *columns) for box in boxes}
        arrays = {wide: _empty(wide, leaf.dtype) for wide in rows.values()}
        cut = {
            box: arrays[wide][(slice(None),) * rest + tuple(slice(*span) for span in box[rest:])]
            for box, wide in rows.items()
        }
        return cut, (read for wide, array in arrays.items() for read in self._reads(leaf, wide, array))

    def _reads(self, leaf: Leaf, box: Box, array: np.ndarray) -> Reads:
        rows = box[1] if leaf.stacked else box[0]
        for expert in range(*box[0]) if leaf.stacked else [0]:
            target = array[expert - box[0][0]] if leaf.stacked else array
            buffer = target.reshape(-1).view(np.uint8)
            yield partial(self.published.read, leaf.pattern.format(expert), *rows, buffer)


@dataclasses.dataclass(frozen=True)
class ConvertedSource:
    """A checkpoint that `convert` wrote."""

    contents: Contents
    folder: Place
    grids: Mapping[str, ChunkGrid]

    def blocks(self, leaf: Leaf, boxes: Iterable[Box]) -> tuple[dict[Box, np.ndarray], Reads]:
        """As `PublishedSource.blocks`. A byte range that several parts want some columns of is read once."""
        arrays = {box: _empty(box, leaf.dtype) for box in boxes}
        grid = self.grids[leaf.path]
        wanted: defaultdict[tuple[int, int, tuple[int, ...]], list[Cut]] = defaultdict(list)
        for box, array in arrays.items():
            for number, offset, shape, where in grid.ranges(box):
                overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, where, strict=True)]
                target = array[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(overlap, box, strict=True))]
                kept = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(overlap, where, strict=True))
                wanted[number, offset, shape].append((target, kept))
        folder = self.folder / leaf.path
        return arrays, (
            partial(self._fill, leaf, folder / grid.file(number), offset, shape, cuts)
            for (number, offset, shape), cuts in wanted.items()
        )

    def _fill(
        self,
        leaf: Leaf,
        file: Place,
        offset: int,
        shape: tuple[int, ...],
        cuts: list[Cut],
    ) -> None:
        """Reads what lies at `offset`, of `shape`, and has the arrays of `cuts` take their parts of it."""
        target, _ = cuts[0]
        whole = len(cuts) == 1 and target.shape == shape and target.flags.c_contiguous
        into = target if whole else np.empty(shape, leaf.dtype)
        data = into.reshape(-1).view(np.uint8).data
        try:
            complete = read_into(file, offset, data) == len(data)
        except FileNotFoundError:
            complete = False
        if not complete:
            raise CheckpointError(f"{self.folder}: leaf {leaf.path} is damaged or not there, in {file.name}")
        for target, kept in [] if whole else cuts:
            target[...] = into[kept]


def _empty(box: Box, dtype: np.dtype) -> np.ndarray:
    """An array that a CPU device can take as it lies."""
    shape = tuple(stop - start for start, stop in box)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return aligned(nbytes)[:nbytes].view(dtype).reshape(shape)


def open_checkpoint(path: str | Path | Remote) -> PublishedSource | ConvertedSource:
    """The checkpoint of either kind in `path`, a folder or URL, its contents checked by name, shape and dtype.

    Raises FileNotFoundError where there is none, ConfigError or CheckpointError (both ValueErrors) for one that is
    damaged or does not fit its config.json.
    """
    folder = at(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        published = open_published(folder)
        return PublishedSource(contents(config_json.from_folder(folder), published), published)
    found = manifest.read(folder)
    grids = {path: record.grid for path, record in found.leaves.items()}
    return ConvertedSource(found.contents(), folder, grids)
