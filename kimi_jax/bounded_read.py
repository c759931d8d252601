"""Reads a file up to a limit, in memory for the bytes that it has and not for the limit."""

from typing import BinaryIO

PIECE = 2**20  # bytes; a pipe or a device may give fewer at a time


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """Returns the rest of `file`; of a file longer than `limit` bytes, its first `limit + 1` bytes or more.

    It reads pieces of 1 MiB, since `file.read(limit)` allocates `limit` bytes first even for a short file.
    """
    pieces, size = [], 0
    while size <= limit and (piece := file.read(PIECE)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
