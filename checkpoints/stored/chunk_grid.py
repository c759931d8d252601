"""Cuts a stored leaf into files (chunks), and a file into byte ranges (parts).

An array is zarr v3, uncompressed. A chunk, one file, is one expert, or rows of another leaf. Inside a file the chunk is
cut once more, along the dimension that tensor parallelism splits (zarr's `sharding_indexed` codec), so that the part of
any device is whole byte ranges, for Orbax as for us, without more files. A cut along rows leaves the published bytes as
they were. https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints.files.place import Place
from checkpoints.stored.names import Leaf

CHUNK_BYTES = 32 * 2**20
PARTS = 16  # the finest tensor parallelism whose devices read no bytes of each other
PART_BYTES = 64 * 2**10  # a smaller read takes longer than the bytes it saves
_UNSPLIT = (None, "embed", "expert")  # logical axes that tensor parallelism leaves whole


# Part of an array: its start and stop along each dimension.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ByteRange:
    """The bytes of `file`, from `offset` on, that are part `box` of a leaf, in C order. `holder` says whose they are
    ("/folder: leaf lm_head.weight"), for an error message."""

    file: Place
    offset: int
    box: Box
    holder: str


@dataclass(frozen=True)
class ChunkGrid:
    """The cuts of a leaf of `shape` and `dtype`: `chunk` is the shape of one file, `part` that of one byte range in it.
    `chunk` divides `shape`, `part` divides `chunk`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    part: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of chunks along each dimension."""
        return tuple(size // chunk for size, chunk in zip(self.shape, self.chunk, strict=True))

    @property
    def chunks(self) -> int:
        """The number of chunks, which are numbered in C order of the grid."""
        return math.prod(self.counts)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def part_bytes(self) -> int:
        return math.prod(self.part) * self.dtype.itemsize

    @property
    def parts(self) -> tuple[int, ...]:
        """The number of parts along each dimension of a chunk."""
        return tuple(chunk // part for chunk, part in zip(self.chunk, self.part, strict=True))

    @property
    def file_bytes(self) -> int:
        """The size of a chunk's file: its bytes and, where it is cut, the offset and size of each part."""
        return self.chunk_bytes + (16 * math.prod(self.parts) if self.part != self.chunk else 0)

    def index(self, number: int) -> tuple[int, ...]:
        """Returns the place of chunk `number` in the grid."""
        return tuple(int(i) for i in np.unravel_index(number, self.counts)) if self.counts else ()

    def file(self, number: int) -> str:
        """Returns the name of the file of chunk `number`, in the leaf's folder."""
        return ".".join(("c", *map(str, self.index(number))))

    def files(self) -> Iterator[str]:
        """Yields the names of all chunks' files, by number."""
        return map(self.file, range(self.chunks))

    def metadata(self) -> dict[str, Any]:
        """Returns zarr.json, without the fields that have only one value."""
        codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.part != self.chunk:
            inner = {"chunk_shape": self.part, "codecs": codecs, "index_codecs": codecs, "index_location": "end"}
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        return {
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": codecs,
        }

    @property
    def verbatim(self) -> bool:
        """True where the file begins with the chunk's values in C order: it is not cut, or only along rows."""
        cut = next((i for i, parts in enumerate(self.parts) if parts > 1), 0)
        return math.prod(self.chunk[:cut]) == 1

    def encode(self, chunk: np.ndarray) -> list[np.ndarray]:
        """Returns the bytes of a chunk's file, in pieces; `chunk`, in C order, is not copied where it is verbatim."""
        parts = [chunk] if self.verbatim else [np.ascontiguousarray(chunk[cut]) for cut in self._cuts()]
        pieces = [part.reshape(-1).view(np.uint8) for part in parts]
        return [*pieces, self.footer] if self.footer.size else pieces

    @property
    def footer(self) -> np.ndarray:
        """The bytes after a chunk's values in its file: where it is cut, zarr's index of its parts; none where not."""
        count = math.prod(self.parts) if self.part != self.chunk else 0
        ranges = [(i * self.part_bytes, self.part_bytes) for i in range(count)]
        return np.array(ranges, "<u8").reshape(-1).view(np.uint8)

    def decode(self, data: np.ndarray) -> np.ndarray:
        """Returns the chunk whose file has the bytes `data`."""
        values = data[: self.chunk_bytes].view(self.dtype)
        if self.verbatim:
            return values.reshape(self.chunk)
        chunk = np.empty(self.chunk, self.dtype)
        for cut, part in zip(self._cuts(), values.reshape(-1, *self.part), strict=True):
            chunk[cut] = part
        return chunk

    def ranges(self, box: Box, folder: Place, holder: str) -> Iterator[ByteRange]:
        """Yields the byte ranges that part `box` of the leaf in `folder` needs. A range has whole rows of a part,
        perhaps wider than the box."""
        unit = self.chunk if self.verbatim else self.part
        per_chunk = [chunk // size for chunk, size in zip(self.chunk, unit, strict=True)]
        spans = [range(start // size, -(-stop // size)) for (start, stop), size in zip(box, unit, strict=True)]
        lead = next((i for i, size in enumerate(unit) if size > 1), 0)  # rows are contiguous from here on
        for place in itertools.product(*spans):
            chunk = [i // n for i, n in zip(place, per_chunk, strict=True)]
            inner = [i % n for i, n in zip(place, per_chunk, strict=True)]
            found = [(i * size, (i + 1) * size) for i, size in zip(place, unit, strict=True)]
            first, last = max(box[lead][0], found[lead][0]), min(box[lead][1], found[lead][1])
            number = int(np.ravel_multi_index(chunk, self.counts))
            row = math.prod(unit[lead + 1 :]) * self.dtype.itemsize
            offset = int(np.ravel_multi_index(inner, per_chunk)) * math.prod(unit) * self.dtype.itemsize
            offset += (first - found[lead][0]) * row
            found[lead] = (first, last)
            yield ByteRange(folder / self.file(number), offset, tuple(found), holder)

    def _cuts(self) -> Iterator[tuple[slice, ...]]:
        sizes = [range(0, chunk, part) for chunk, part in zip(self.chunk, self.part, strict=True)]
        for start in itertools.product(*sizes):
            yield tuple(slice(s, s + part) for s, part in zip(start, self.part, strict=True))


def chunk_grid(leaf: Leaf) -> ChunkGrid:
    """Cuts a leaf: one expert a chunk, or the leading axis halved until a chunk has at most `CHUNK_BYTES`; parts along
    the dimension that tensor parallelism may split, halved until there are `PARTS` of them. All stay divisors of the
    shape, so that none straddles the shards of a mesh."""
    chunk = list(leaf.shape)
    if leaf.stacked:
        chunk[0] = 1
    else:
        while _nbytes(chunk, leaf) > CHUNK_BYTES and chunk[0] % 2 == 0:
            chunk[0] //= 2
    part = list(chunk)
    axis = next((i for i, name in enumerate(leaf.axes) if name not in _UNSPLIT), 0)
    while (
        part and part[axis] * PARTS > leaf.shape[axis] and part[axis] % 2 == 0 and _nbytes(part, leaf) >= 2 * PART_BYTES
    ):
        part[axis] //= 2
    return ChunkGrid(leaf.shape, leaf.dtype, tuple(chunk), tuple(part))


def _nbytes(shape: list[int], leaf: Leaf) -> int:
    return math.prod(shape) * leaf.dtype.itemsize
