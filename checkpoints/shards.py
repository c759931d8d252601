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

from checkpoints.safetensors import DTYPES, INDEX

SHARD_BYTES = 5 * 10**9
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
    manager; leaving it makes sure that every byte was written, and lies on the disk.

    Raises OSError naming the file where the disk is full.
    """

    def __init__(self, folder: Path, shards: Sequence[Sequence[Entry]]):
        self._places: dict[str, tuple[Entry, int, int]] = {}  # entry, file, offset
        self._files: list[tuple[Path, int]] = []
        self._lock = threading.Lock()
        self._left = 0
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            path = folder / f"model-{number + 1:05d}-of-{len(shards):06d}.safetensors"
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
            end = 0
            for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
                start, end = end, end + entry.nbytes
                header[entry.name] = {
                    "dtype": _CODES[entry.dtype],
                    "shape": list(entry.shape),
                    "data_offsets": [start, end],
                }
                self._places[entry.name] = (entry, number, start)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self._files.append((path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)))
            self._put(number, len(text).to_bytes(8, "little") + text, 0)
            for entry in shard:
                _, _, start = self._places[entry.name]
                self._places[entry.name] = (entry, number, 8 + len(text) + start)
                weight_map[entry.name] = path.name
            self._left += end
        index = {"metadata": {"total_size": self._left}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, name: str, block: np.ndarray, row: int = 0) -> None:
        """Rows `row` and following of tensor `name`."""
        entry, number, offset = self._places[name]
        assert block.dtype == entry.dtype and (block.shape == entry.shape or block.shape[1:] == entry.shape[1:]), name
        self._put(number, np.ascontiguousarray(block).reshape(-1).view(np.uint8).data, offset + row * entry.row_bytes)
        with self._lock:
            self._left -= block.nbytes

    def _put(self, number: int, data: bytes | memoryview, offset: int) -> None:
        path, file = self._files[number]
        done, view = 0, memoryview(data)
        try:
            while done < len(view):  # one call writes 2 GiB at most
                done += os.pwrite(file, view[done:], offset + done)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        for _, file in self._files:
            if error is None:
                os.fsync(file)
            os.close(file)
        assert error is not None or self._left == 0, f"{self._left} bytes were not written"
