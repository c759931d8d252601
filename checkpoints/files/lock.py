"""A file's lock, which the system releases when its holder ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold_lock(path: Path, message: str) -> Iterator[None]:
    """Holds the lock of the file at `path`, which is made where there is none.

    Raises FileExistsError, which `message` opens, where another process holds it (named by its pid and host), or has
    moved or removed the file since.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode()
            raise FileExistsError(f"{message}: {holder}") from None
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileExistsError(f"{message}: it has just finished or failed")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # and with it the lock
