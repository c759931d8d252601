"""Reads a file up to a limit, in memory for the bytes that it has and not for the limit."""

from typing import Protocol, runtime_checkable

PIECE = 2**20


@runtime_checkable
class Readable(Protocol):
    """A file opened for reading bytes."""

    def read(self, count: int, /) -> bytes: ...


def read_at_most(file: Readable, limit: int) -> bytes:
    """Returns the rest of `file`, or its first `limit + 1` bytes where it is longer than `limit`.

    `file.read(limit)` allocates `limit` bytes first, of however few the file has; this reads pieces of 1 MiB.
    """
    pieces, size = [], 0
    while size <= limit and (piece := file.read(min(PIECE, limit + 1 - size))):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
