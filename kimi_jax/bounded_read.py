"""Reads a file that may be longer than wanted, or endless, without room for the most that it may have."""

from typing import BinaryIO

PIECE = 2**20


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """Returns the rest of `file`, or its first `limit + 1` bytes or more where it is longer than `limit`.

    `file.read(limit)` allocates `limit` bytes first, of however few the file has; this reads pieces of 1 MiB.
    """
    pieces, size = [], 0
    while size <= limit and (piece := file.read(PIECE)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
