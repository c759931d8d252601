"""What is read of a published folder to make each stored chunk, and how: pure functions, a chunk or a few at a time.

`plan` says which leaves a conversion stores, and `Plan.jobs` cuts the work into jobs that know nothing of each other.
`convert` reads `Job.reads`, calls `Job.make` with those arrays, and writes what it gives as the chunks `Job.makes`. A
job may make chunks of several leaves (quantising rows gives words and scales). Chunks are those of `layout`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from checkpoints.layout import layout
from checkpoints.names import SCALE, Contents, Leaf
from checkpoints.safetensors import CheckpointError, Published


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of the published tensor `name`, all of it by default."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Chunk `number`, in C order of the grid, of the stored leaf at `path`."""

    path: str
    number: int


@dataclass(frozen=True)
class Job:
    """`make(*arrays)` gives, for the arrays of `reads` in their order, those of the chunks `makes` in theirs, in C
    order and of the chunk's shape. It is pure, may give back its arguments or views of them, and runs in a thread among
    others. `nbytes` is the memory that the job needs at its worst: what it reads, what it makes, and what `make` holds
    between.

    `make` raises CheckpointError naming file and tensor for values that cannot be (a scale that is not finite).
    """

    reads: tuple[Rows, ...]
    makes: tuple[Chunk, ...]
    make: Callable[..., tuple[np.ndarray, ...]]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """The `leaves` that a conversion stores, `form` (what else than the source decides them, as JSON, recorded so that
    a conversion is only resumed as it was begun), and `jobs`, a fresh iterator over all jobs, alike at every call: in
    about the order of the source's bytes, each chunk made once."""

    leaves: tuple[Leaf, ...]
    form: dict[str, str]
    jobs: Callable[[], Iterator[Job]]


def plan(published: Published, contents: Contents) -> Plan:
    """Everything as published, word for word."""
    order = {name: i for i, name in enumerate(published.tensors)}
    leaves = sorted(contents.leaves, key=lambda leaf: order[leaf.names[0]])

    def jobs() -> Iterator[Job]:
        for leaf in leaves:
            yield from _verbatim(published, leaf)

    return Plan(contents.leaves, {"experts": "as published"}, jobs)


def _verbatim(published: Published, leaf: Leaf) -> Iterator[Job]:
    """A chunk of a stacked leaf is an expert's tensor, of another one rows of its only tensor."""
    cut = layout(leaf)
    rows = cut.chunk[0] if cut.chunk else None
    for number in range(cut.chunks):
        read = Rows(leaf.names[number]) if leaf.stacked else Rows(leaf.pattern)
        if not leaf.stacked and rows is not None and cut.chunks > 1:
            read = Rows(leaf.pattern, number * rows, (number + 1) * rows)
        make = _finite(published, read, cut.chunk) if leaf.path.endswith(SCALE) else _reshaped(cut.chunk)
        # twice, since a cut along columns is copied
        yield Job((read,), (Chunk(leaf.path, number),), make, 2 * cut.chunk_bytes)


def _reshaped(shape: tuple[int, ...]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    return lambda array: (array.reshape(shape),)


def _finite(published: Published, read: Rows, shape: tuple[int, ...]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    def make(scales: np.ndarray) -> tuple[np.ndarray, ...]:
        if not np.isfinite(scales.astype(np.float32)).all():
            row = read.start + int(np.argwhere(~np.isfinite(scales.astype(np.float32)))[0][0])
            raise CheckpointError(
                f"{published.tensors[read.name].file}: tensor {read.name} has a scale in row {row} that is not finite"
            )
        return (scales.reshape(shape),)

    return make
