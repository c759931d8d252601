"""Reads a published folder of safetensors: headers, then byte ranges, one tensor (or some of its rows) at a time.

The format (https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header of dtypes, shapes and
byte ranges, then the data, little-endian. The safetensors library maps its files, and mapped pages count as resident
memory; here every read goes straight into the array that is returned, so memory is what is held and no more.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from checkpoints.files.place import Place, Remote, locate, read_into, size
from kimi_jax import json_reader
from kimi_jax.file_kinds import HEAD, mistaken
from kimi_jax.printable import printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    code: np.dtype(dtype)
    for code, dtype in {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_DIMENSIONS = 64  # NumPy's limit
_PART = re.compile(r"-\d+-of-(\d+)\.safetensors$")  # a shard by its name; the number is of all shards
_HEADER_LIMIT = 100_000_000  # the library's own; a larger number is a damaged file


class CheckpointError(ValueError):
    """Says why a checkpoint cannot be read; the message names the file and the tensor."""


@dataclass(frozen=True)
class Tensor:
    """The place of a tensor of `shape` and `dtype`: `nbytes` bytes from `offset` of `file`, in C order."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Place
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Published:
    """A folder of safetensors: shards with their index, or one file. `tensors` has them by name, in the order of the
    files and of their bytes."""

    folder: Place
    tensors: Mapping[str, Tensor]
    files: tuple[Place, ...]

    @classmethod
    def open(cls, folder: str | Path | Remote) -> "Published":
        """Reads every header in `folder`, a path or URL, and checks it against the index, where there is one.

        Like the safetensors library it refuses bytes that are no tensor's, numbers that are not whole, and metadata
        that are not strings. Raises FileNotFoundError if there are no safetensors, `CheckpointError` naming file and
        tensor for a shard that is missing, truncated, damaged or of another kind, a tensor that is there twice, and an
        index that contradicts the shards.
        """
        folder = locate(folder)
        if (folder / INDEX).is_file():
            weight_map = _weight_map(folder / INDEX)
            files = tuple(folder / file for file in sorted(set(weight_map.values())))
        else:
            weight_map, files = None, (_only_file(folder),)
        tensors: dict[str, Tensor] = {}
        for file in files:
            if not file.is_file():
                count = sum(name == file.name for name in (weight_map or {}).values())
                raise CheckpointError(f"{file}: shard is missing; {INDEX} places {count} tensors in it")
            for tensor in _header(file):
                if tensor.name in tensors:
                    where = tensors[tensor.name].file.name
                    raise CheckpointError(f"{file}: tensor {printable(tensor.name)} is also in {where}")
                tensors[tensor.name] = tensor
        if weight_map is not None:
            _check_index(folder / INDEX, weight_map, tensors)
        return cls(folder, tensors, files)

    def read(self, name: str, start: int = 0, stop: int | None = None, buffer: np.ndarray | None = None) -> np.ndarray:
        """Returns tensor `name`, or its rows `start` to `stop` along the leading axis, in the stored dtype.

        The result is a view of `buffer` where one is given: uint8, at least as many as the result has bytes.
        Raises KeyError for a name that is not there, `CheckpointError` for a file that ends early.
        """
        tensor = self.tensors[name]
        shape, offset = tensor.shape, tensor.offset
        if (start, stop) != (0, None):
            rows = range(shape[0])[start:stop]
            offset += start * math.prod(shape[1:]) * tensor.dtype.itemsize
            shape = (len(rows), *shape[1:])
        nbytes = math.prod(shape) * tensor.dtype.itemsize
        flat = np.empty(nbytes, np.uint8) if buffer is None else buffer[:nbytes]
        if (count := read_into(tensor.file, offset, flat.data)) < nbytes:
            raise CheckpointError(f"{tensor.file}: ends inside tensor {printable(name)}, at byte {offset + count}")
        return flat.view(tensor.dtype).reshape(shape)


def _only_file(folder: Place) -> Place:
    """Returns the file that holds all tensors of a folder without an index, whatever its name. Raises FileNotFoundError
    where there is none, `CheckpointError` where there are several, or one that its name calls a part of more."""
    files: list[Place] = sorted(folder.glob("*.safetensors"), key=lambda file: file.name)
    files = [file for file in files if file.name == SINGLE] or files
    if not files:
        raise FileNotFoundError(f"{folder}: holds neither {INDEX} nor {SINGLE}")
    part = _PART.search(files[0].name)
    if len(files) > 1 or (part and int(part[1]) != 1):
        names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
        raise CheckpointError(f"{folder}: {INDEX} is missing, which says where the tensors are; there is {names}")
    return files[0]


def _weight_map(path: Place) -> dict[str, str]:
    weight_map = json_reader.read_object(path, error=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or "\0" in file or Path(file).name != file:
            where = printable(repr(file))
            raise CheckpointError(
                f"{path}: tensor {printable(name)} is placed in {where}, expected a file of the same folder"
            )
    return weight_map


def _check_index(index: Place, weight_map: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: places tensor {printable(name)} in {file}, which does not hold it")
        if (found := tensors[name].file.name) != file:
            raise CheckpointError(f"{index}: places tensor {printable(name)} in {file}, but it lies in {found}")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{tensor.file}: tensor {printable(name)} is not named by {index.name}")


def _header(file: Place) -> list[Tensor]:
    """Returns the tensors of one file, in the order of their bytes, which they fill from the header to the end."""
    end = size(file)
    length = int.from_bytes(_bytes(file, 0, 8), "little")
    try:
        if end < 8 or length > min(end - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{file}: truncated: {end} bytes cannot hold a header of {length}")
        text = _bytes(file, 8, length)
        if not text.startswith(b"{"):
            raise CheckpointError(f"{file}: its header is not JSON: it begins with {printable(text[:8])}, expected {{")
        header = json_reader.parse_object(text, f"{file}: its header", error=CheckpointError)
    except CheckpointError:
        if kind := mistaken(_bytes(file, 0, HEAD)):
            raise CheckpointError(f"{file}: is {kind}") from None
        raise
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{file}: its __metadata__ is {printable(metadata)}, expected strings by name")
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))  # an empty one before that which begins there too
    _check_filled(file, tensors, 8 + length, end)
    return tensors


def _check_filled(file: Place, tensors: list[Tensor], start: int, end: int) -> None:
    """Raises CheckpointError unless the tensors, in order, fill the bytes from `start` to `end`, each byte once."""
    before = "its header"
    for tensor in tensors:
        last = tensor.offset + tensor.nbytes
        if last > end or tensor.offset != start:
            name = printable(tensor.name)
            if last > end:
                raise CheckpointError(f"{file}: truncated: tensor {name} ends at byte {last}, the file at {end}")
            if tensor.offset < start:
                raise CheckpointError(f"{file}: tensors {printable(before)} and {name} overlap")
            raise CheckpointError(f"{file}: bytes {start} to {tensor.offset}, before tensor {name}, are no tensor's")
        before, start = tensor.name, last
    if start < end:
        raise CheckpointError(f"{file}: the last {end - start} bytes, after {printable(before)}, are no tensor's")


def _bytes(file: Place, offset: int, length: int) -> bytes:
    into = bytearray(length)
    return bytes(into[: read_into(file, offset, memoryview(into))])


def _tensor(file: Place, name: str, entry: Any, data: int) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(code, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{file}: tensor {printable(name)} has a header without dtype, shape or data_offsets in whole numbers"
        )
    if code not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {printable(name)} has dtype {printable(repr(code))}, expected one of {', '.join(DTYPES)}"
        )
    start, end = offsets
    tensor = Tensor(name, DTYPES[code], tuple(shape), file, data + start)
    if end - start != tensor.nbytes or not _fits(tensor):
        raise CheckpointError(
            f"{file}: tensor {printable(name)} of {code} {printable(shape)} has bytes {start} to {end}, "
            f"expected {printable(tensor.nbytes)} bytes"
        )
    return tensor


def _sizes(values: Any) -> TypeGuard[list[int]]:
    """Returns whether `values` is a list of whole numbers, of which True is none."""
    return (
        type(values) is list
        and set(map(type, values)) <= {int}
        and (not values or (min(values) >= 0 and max(values) < 2**64))
    )


def _fits(tensor: Tensor) -> bool:
    """Returns whether NumPy has arrays of this shape; an empty one may have any numbers besides its 0."""
    filled = tensor.shape if 0 not in tensor.shape else [n or 1 for n in tensor.shape]
    return len(filled) <= _DIMENSIONS and math.prod(filled) * tensor.dtype.itemsize < 2**63
