"""Writes a published folder's safetensors: planned from names, dtypes and shapes, then filled in any order.

A shard's header is written first, and every block of rows then goes to its own place in the file, so nothing is held
and several threads may write. As in files of the safetensors library, a shard has its widest dtypes first: readers may
rely on a tensor's bytes being aligned to its items.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints.jobs.files import check_room
from checkpoints.published.safetensors import DTYPES, INDEX
from checkpoints.stored.writing import fsync

SHARD_BYTES = 5 * 10**9
_UNFINISHED = ".unfinished"
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the leading axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def planned(entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES) -> list[list[Entry]]:
    """`entries` in their order, cut into shards of at most `shard_bytes`, or of one tensor that is larger."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


class ShardWriter:
    """Writes `shards` to the existing `folder` as model-00001-of-00000N.safetensors, with their index. A context
    manager; leaving it makes sure that every byte was written. `write` may be called by several threads.

    A shard gets its name when it is whole and safe from a loss of power; until then it is called `*.unfinished`. One
    that a writer finished before it was killed is not written again: `finished` names its tensors. Files are open only
    while a block is written, so there may be more of them than a process may open.

    Raises OSError naming the file where the disk is full, and before the first byte where it has too little room.
    """

    def __init__(self, folder: Path, shards: Sequence[Sequence[Entry]]):
        self.folder = folder
        self._files = [folder / f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors" for i in range(len(shards))]
        self._left = [sum(entry.nbytes for entry in shard) for shard in shards]
        self._total = sum(self._left)
        self._lock = threading.Lock()
        self._places: dict[str, tuple[Entry, int, int]] = {}  # entry, number of the shard, offset
        self.finished: set[str] = set()
        headers = [self._place(number, shard) for number, shard in enumerate(shards)]
        for number, (file, header, shard) in enumerate(zip(self._files, headers, shards, strict=True)):
            if _is_whole(file, header, self._left[number]):
                self._left[number] = 0
                self.finished.update(entry.name for entry in shard)
            else:
                _unfinished(file).unlink(missing_ok=True)
        check_room(folder, sum(self._left))
        for file, header, left in zip(self._files, headers, self._left, strict=True):
            if left:
                _put(_unfinished(file), header, 0, os.O_CREAT | os.O_EXCL)

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, name: str, block: np.ndarray, row: int = 0) -> None:
        """Writes rows `row` and following of tensor `name`, each once; does nothing for those in `finished`."""
        if name in self.finished:
            return
        entry, number, offset = self._places[name]
        assert block.dtype == entry.dtype and (block.shape == entry.shape or block.shape[1:] == entry.shape[1:]), name
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        file = self._files[number]
        _put(_unfinished(file), data, offset + row * entry.row_bytes)
        with self._lock:
            self._left[number] -= block.nbytes
            whole = self._left[number] == 0
        if whole:
            fsync(_unfinished(file))
            _unfinished(file).rename(file)

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error is not None:
            return
        assert not any(self._left), f"{sum(self._left)} bytes were not written"
        weight_map = {name: self._files[number].name for name, (_, number, _) in self._places.items()}
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _place(self, number: int, shard: Sequence[Entry]) -> bytes:
        """Returns the header of a shard, and notes where its tensors are to be."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        starts, end = {}, 0
        for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
            starts[entry.name], end = end, end + entry.nbytes
            offsets = [starts[entry.name], end]
            header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for entry in shard:
            self._places[entry.name] = (entry, number, 8 + len(text) + starts[entry.name])
        return len(text).to_bytes(8, "little") + text


def _unfinished(file: Path) -> Path:
    return file.with_name(file.name + _UNFINISHED)


def _is_whole(file: Path, header: bytes, nbytes: int) -> bool:
    """Returns whether `file` is there with this header and `nbytes` of tensors."""
    if not file.is_file() or file.stat().st_size != len(header) + nbytes:
        return False
    with file.open("rb") as stream:
        return stream.read(len(header)) == header


def _put(file: Path, data: bytes | memoryview, offset: int, flags: int = 0) -> None:
    done, view = 0, memoryview(data)
    try:
        descriptor = os.open(file, os.O_WRONLY | flags, 0o666)
        try:
            while done < len(view):  # one call writes 2 GiB at most
                done += os.pwrite(descriptor, view[done:], offset + done)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None
