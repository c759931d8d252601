"""Writes a published folder's safetensors: split_into_shards from names, dtypes and shapes, then filled in any order.

A shard's header is written first, and every block of rows then goes to its own place in the file, so no tensor is kept
in memory and several threads may write. Like files of the safetensors library, a shard has its widest dtypes first:
readers may rely on a tensor's bytes being aligned to its items.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoints.files.new_folder import check_room
from checkpoints.files.writing import fsync
from checkpoints.published.safetensors import DTYPES, INDEX

SHARD_BYTES = 5 * 10**9
_UNFINISHED = ".unfinished"
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorHeader:
    """The header of a tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """The bytes of one index of the leading axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def split_into_shards(tensors: Iterable[TensorHeader], shard_bytes: int = SHARD_BYTES) -> list[list[TensorHeader]]:
    """Cuts `tensors`, in their order, into shards of at most `shard_bytes`, or of one tensor that is larger."""
    shards: list[list[TensorHeader]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


class ShardWriter:
    """Writes `shards` to the existing `folder` as model-00001-of-00000N.safetensors, with their index. It is a context
    manager; leaving it checks that every byte was written. Several threads may call `write`.

    A shard gets its name when it is whole and safe from a loss of power; until then it is called `*.unfinished`. One
    that a writer finished before it was killed is not written again: `finished` names its tensors. Files are open only
    while a block is written, so there may be more of them than a process may open.

    Raises OSError naming the file where the disk is full, and before the first byte where it has too little room.
    """

    def __init__(self, folder: Path, shards: Sequence[Sequence[TensorHeader]]):
        self.folder = folder
        self._files = [folder / f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors" for i in range(len(shards))]
        self._left = [sum(tensor.nbytes for tensor in shard) for shard in shards]
        self._total = sum(self._left)
        self._lock = threading.Lock()
        self._places: dict[str, tuple[TensorHeader, int, int]] = {}  # tensor, number of the shard, offset
        self.finished: set[str] = set()
        headers = [self._place(number, shard) for number, shard in enumerate(shards)]
        for number, (file, header, shard) in enumerate(zip(self._files, headers, shards, strict=True)):
            if _is_whole(file, header, self._left[number]):
                self._left[number] = 0
                self.finished.update(tensor.name for tensor in shard)
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
        tensor, number, offset = self._places[name]
        assert block.dtype == tensor.dtype and (block.shape == tensor.shape or block.shape[1:] == tensor.shape[1:]), (
            name
        )
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        file = self._files[number]
        _put(_unfinished(file), data, offset + row * tensor.row_bytes)
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

    def _place(self, number: int, shard: Sequence[TensorHeader]) -> bytes:
        """Returns the header of a shard, and notes where its tensors are to be."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        starts, end = {}, 0
        for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
            starts[tensor.name], end = end, end + tensor.nbytes
            offsets = [starts[tensor.name], end]
            header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for tensor in shard:
            self._places[tensor.name] = (tensor, number, 8 + len(text) + starts[tensor.name])
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
