"""Folders of either kind as sources of stored leaves, any part of which is some byte ranges of their files."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from checkpoints.files.place import Place, Remote, aligned_bytes, locate, read_into
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.published.spellings import open_published
from checkpoints.stored.chunk_grid import Box, ByteRange
from checkpoints.stored.eagle import eagle_contents
from checkpoints.stored.folder import Converted
from checkpoints.stored.manifest import MANIFEST
from checkpoints.stored.names import Contents, Leaf, contents
from kimi_jax import config_json
from kimi_jax.config import EagleConfig

RANGE_BYTES = 16 * 2**20  # an FP8 tensor of Kimi-K2's experts (14.7 MB) is one range; `load` has 8 in memory at once


@dataclass(frozen=True)
class PublishedLeaves:
    """A published folder as the stored leaves of a model."""

    published: Published

    @property
    def folder(self) -> Place:
        return self.published.folder

    @cached_property
    def contents(self) -> Contents:
        """The model or head, leaves and tensors left out. Raises what `published_contents` raises."""
        return published_contents(self.published)

    def ranges(self, leaf: Leaf, box: Box) -> Iterator[ByteRange]:
        """Yields the byte ranges that part `box` of a leaf needs: whole rows of tensors, at most `RANGE_BYTES` each."""
        experts, (start, stop) = (range(*box[0]), box[1]) if leaf.stacked else ([0], box[0])
        columns = leaf.shape[2 if leaf.stacked else 1 :]
        row_bytes = math.prod(columns) * leaf.dtype.itemsize
        step = max(RANGE_BYTES // row_bytes, 1)
        for expert in experts:
            tensor = self.published.tensors[leaf.pattern.format(expert)]
            holder = f"{self.folder}: tensor {tensor.name}"
            outer = ((expert, expert + 1),) if leaf.stacked else ()
            for row in range(start, stop, step):
                rows = (row, min(row + step, stop))
                part = (*outer, rows, *((0, size) for size in columns))
                yield ByteRange(tensor.file, tensor.offset + row * row_bytes, part, holder)


def published_contents(published: Published) -> Contents:
    """Returns the contents of a published folder, of a model or a draft head. Raises what `names.contents` and
    `eagle.eagle_contents` raise, and ConfigError."""
    config = config_json.read_config(published.folder)
    return eagle_contents(config, published) if isinstance(config, EagleConfig) else contents(config, published)


# Sources of stored leaves: both have `folder`, `contents` and `ranges`.
Source = Converted | PublishedLeaves


def open_source(path: str | Path | Remote) -> Source:
    """Opens the checkpoint in `path`, a folder or URL: one that `convert` wrote, or a published folder.

    Raises FileNotFoundError where there is none, CheckpointError where its manifest or the headers of its files are
    damaged. Reading `contents` then checks it by name, shape and dtype.
    """
    folder = locate(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / MANIFEST).is_file():
        return Converted.open(folder)
    return PublishedLeaves(open_published(folder))


@dataclass(frozen=True)
class LeafReads:
    """New host arrays for parts of a leaf, and the byte ranges that fill them: each once, whatever the number of boxes
    that take some columns of it."""

    arrays: Mapping[Box, np.ndarray]
    ranges: Mapping[ByteRange, Sequence[Box]]

    def fill(self, found: ByteRange) -> None:
        """Reads one range into the arrays; any order, several threads at once. Raises CheckpointError naming folder,
        leaf or tensor, and file, where it is not there or ends early."""
        shape = tuple(stop - start for start, stop in found.box)
        cuts = [_overlap(self.arrays[box], box, found.box) for box in self.ranges[found]]
        target, _ = cuts[0]
        direct = len(cuts) == 1 and target.shape == shape and target.flags.c_contiguous
        into = target if direct else np.empty(shape, target.dtype)
        data = into.reshape(-1).view(np.uint8).data
        try:
            complete = read_into(found.file, found.offset, data) == len(data)
        except FileNotFoundError:
            complete = False
        if not complete:
            raise CheckpointError(f"{found.holder} is damaged or not there, in {found.file.name}")
        for target, part in [] if direct else cuts:
            target[...] = into[part]


def plan_reads(source: Source, leaf: Leaf, boxes: Iterable[Box]) -> LeafReads:
    """Allocates parts `boxes` of a leaf, and lists the byte ranges that they need."""
    arrays, ranges = {}, defaultdict(list)
    for box in boxes:
        shape = tuple(stop - start for start, stop in box)
        nbytes = math.prod(shape) * leaf.dtype.itemsize
        arrays[box] = aligned_bytes(nbytes)[:nbytes].view(leaf.dtype).reshape(shape)
        for found in source.ranges(leaf, box):
            ranges[found].append(box)
    return LeafReads(arrays, ranges)


def _overlap(array: np.ndarray, box: Box, other: Box) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Returns the part of `array`, which is `box` of a leaf, that `other` has too, and the slices of `other` there."""
    spans = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True)]
    in_box, in_other = (
        tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(spans, origin, strict=True))
        for origin in (box, other)
    )
    return array[in_box], in_other
