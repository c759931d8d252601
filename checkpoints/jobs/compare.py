"""Compares two checkpoints, tensor by tensor: exactly, or by value whatever their forms; some rows at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoints.files import pipeline
from checkpoints.files.pipeline import ByteCounter, Progress
from checkpoints.forms.transform import SCRATCH_BYTES, plain_rows
from checkpoints.published.endings import is_scales, is_shape, weight_part
from checkpoints.published.numerics import BLOCK, F32
from checkpoints.published.safetensors import CheckpointError, Published, Tensor
from checkpoints.stored.chunk_grid import CHUNK_BYTES
from checkpoints.stored.folder import Converted


@dataclass(frozen=True)
class Finding:
    """The finding about one tensor, or with a tolerance about one weight in whatever form. `problem` is empty where
    both sides agree. The errors, of values, are relative: `max_error` to the largest magnitude of B, `rms_error` to its
    root mean square; 0 for equal bytes."""

    name: str
    problem: str = ""
    max_error: float = 0.0
    rms_error: float = 0.0


Checkpoint = Published | Converted


class Compare:
    """Compares the tensors, or with a tolerance the weights, of two checkpoints."""

    def __init__(self, left: Checkpoint, right: Checkpoint, tolerance: float | None, progress: Progress | None):
        self.sources, self.tolerance = (left, right), tolerance
        self.names = [_names(source.tensors, exact=tolerance is None) for source in (left, right)]
        self.all = list(dict.fromkeys([*self.names[0], *self.names[1]]))
        self.count = ByteCounter(sum(self._nbytes(name) for name in self.all), progress)

    def run(self, workers: int, limit: int) -> list[Finding]:
        found: dict[str, Finding] = {}

        def work(name: str) -> None:
            found[name] = self._finding(name)
            self.count(self._nbytes(name))

        pipeline.run(self.all, work, self._memory, workers=workers, limit=limit)
        return [found[name] for name in self.all]

    def _nbytes(self, name: str) -> int:
        return sum(self.sources[0].tensors[part].nbytes for part in self.names[0].get(name, ()))

    def _memory(self, name: str) -> int:
        """Returns the memory for a block of each side: files, chunks and, with a tolerance, values and differences."""
        sides = [[s.tensors[part] for part in n.get(name, ())] for s, n in zip(self.sources, self.names, strict=True)]
        if not all(sides):
            return 0
        rows = _rows(*sides)
        row_bytes = sum(part.nbytes // max(part.shape[0], 1) if part.shape else 8 for side in sides for part in side)
        read = 4 * rows * row_bytes
        return read if self.tolerance is None else read + 2 * SCRATCH_BYTES * math.prod(_shape(sides[0])[1:])

    def _finding(self, name: str) -> Finding:
        for names, side in zip(self.names, "AB", strict=True):
            if name not in names:
                return Finding(name, f"is not in {side}")
        left, right = ([s.tensors[part] for part in n[name]] for s, n in zip(self.sources, self.names, strict=True))
        try:
            if self.tolerance is None:
                return self._exact(left[0], right[0])
            return self._close(name, left, right, self.tolerance)
        except CheckpointError as error:
            return Finding(name, str(error))

    def _exact(self, left: Tensor, right: Tensor) -> Finding:
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            found = [f"{t.dtype} {list(t.shape)}" for t in (left, right)]
            return Finding(left.name, f"is {found[0]} in A, {found[1]} in B")
        different = 0
        for start, stop in _blocks([left], [right]):
            a, b = (source.read(left.name, start, stop) for source in self.sources)
            a, b = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
            if not np.array_equal(a, b):
                item = left.dtype.itemsize
                different += int((a ^ b).reshape(-1, item).any(-1).sum())
        if different:
            return Finding(left.name, f"differs in {different:,} of {left.nbytes // left.dtype.itemsize:,} elements")
        return Finding(left.name)

    def _close(self, name: str, left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float) -> Finding:
        shapes = [_shape(side) for side in (left, right)]
        if [s for s in shapes[0] if s != 1] != [s for s in shapes[1] if s != 1]:
            return Finding(name, f"has shape {list(shapes[0])} in A, {list(shapes[1])} in B")
        largest = worst = squares = errors = 0.0
        for start, stop in [(0, None)] if shapes[0] != shapes[1] else _blocks(left, right):  # A_log: [h], [1, 1, h, 1]
            sides = zip(self.sources, (left, right), strict=True)
            a, b = (_arrays(source, side, start, stop) for source, side in sides)
            if shapes[0] != shapes[1]:
                a, b = ([array.reshape(-1) for array in arrays] for arrays in (a, b))
            rows = zip(_values(left[0], a, start), _values(right[0], b, start), strict=True)
            for x, y in rows:
                largest = np.maximum(largest, max(y.max(initial=0), -y.min(initial=0)))
                squares += float(np.vdot(y, y))
                x = np.subtract(x, y)
                worst = np.maximum(worst, np.maximum(x.max(initial=0), -x.min(initial=0)))
                errors += float(np.vdot(x, x))
        if not np.isfinite(worst):
            return Finding(name, "holds NaN or infinity")
        relative, rms = (
            float(x / y) + 0.0 if y > 0 else float(x > 0) for x, y in ((worst, largest), (errors, squares))
        )
        problem = "" if worst <= tolerance * largest else f"is off by {relative:.3g} of its largest"
        return Finding(name, problem, relative, rms**0.5)


def _names(tensors: Mapping[str, Tensor], *, exact: bool) -> dict[str, tuple[str, ...]]:
    """Returns the weights by name, and the tensors of each; every tensor by itself where they are compared exactly."""
    if exact:
        return {name: (name,) for name in tensors}
    result: dict[str, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        weight = weight_part(name, tensor.dtype)
        if weight is not None and weight.is_first:
            result[weight.name] = tuple(part for part in weight.names if part in tensors)
        elif not is_scales(name) and not is_shape(name):
            result[name] = (name,)
    return result


def _shape(parts: Sequence[Tensor]) -> tuple[int, ...]:
    first = parts[0]
    weight = weight_part(first.name, first.dtype)
    return first.shape if weight is None else weight.part.weight_shape(first.shape)


def _arrays(source: Checkpoint, parts: Sequence[Tensor], start: int, stop: int | None) -> list[np.ndarray]:
    """Reads rows of a weight, as stored."""
    arrays = [source.read(parts[0].name, start, stop)]
    if len(parts) == 2:
        scales = weight_part(parts[1].name, parts[1].dtype)
        per_row = 1 if scales is None else scales.part.block[0]
        arrays.append(source.read(parts[1].name, start // per_row, stop and -(-stop // per_row)))
    return arrays


def _values(tensor: Tensor, arrays: Sequence[np.ndarray], start: int) -> Iterator[np.ndarray]:
    """Yields rows of a weight in float32, few enough at a time for the processor's cache."""
    try:
        for rows in plain_rows(arrays, start % BLOCK, F32):
            yield rows.astype(F32, copy=False)
    except ValueError as error:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} {error}") from None


def _rows(*sides: Sequence[Tensor]) -> int:
    """Returns the number of rows to read at a time: those of a chunk, where the larger side has chunks."""
    tensor = max((side[0] for side in sides), key=lambda tensor: tensor.nbytes)
    rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = tensor.nbytes // max(rows, 1)
    while rows * row_bytes > CHUNK_BYTES and rows % 2 == 0:
        rows //= 2
    return rows


def _blocks(*sides: Sequence[Tensor]) -> Iterator[tuple[int, int | None]]:
    shape, step = sides[0][0].shape, _rows(*sides)
    if not shape or step == shape[0]:
        yield 0, None
        return
    for start in range(0, shape[0], step):
        yield start, start + step
