"""Reads files of a checkpoint's folder up to a bound, and regular files only."""

import stat
from pathlib import Path

from kimi_jax.printable import printable


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of the file `path`; links are followed, since caches of downloads are made of them.

    Raises FileNotFoundError where there is none, and ValueError where it is a folder, a pipe or a device, or has more
    than `max_bytes`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{printable(path)}: not a regular file")
    if found.st_size > max_bytes:
        raise ValueError(f"{printable(path)}: has {found.st_size:,} bytes, expected at most {max_bytes:,}")
    return path.read_bytes()


def read_text(path: Path, max_bytes: int) -> str:
    """Returns the UTF-8 text in the file `path`. Raises what `read_bounded` raises, and ValueError for other bytes."""
    try:
        return read_bounded(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)}: not UTF-8 text ({error})") from None
