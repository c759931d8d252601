"""Files and folders on disk or behind a URL, byte ranges of them, and digests.

Ranges come by pread straight into the caller's array: mapped pages would count as resident memory. URLs (`gs://`,
`s3://`, `hf://`) go through fsspec, where the library of their kind is installed (gcsfs, s3fs, huggingface_hub).
"""

import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np

from kimi_jax.printable import printable

_BLOCK = 2**23  # bytes that are digested at a time
Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """A file or folder behind a URL, with the few methods of a Path that reading a checkpoint takes.

    Every method raises FileNotFoundError naming the URL where there is no such file, and OSError naming it for any
    other error of the library that serves this kind of URL. Asking for a kind (`exists`, `is_file`, `is_dir`) returns
    False only where the server says that there is nothing of the kind, and raises if it cannot be asked.
    """

    system: fsspec.AbstractFileSystem
    protocol: str
    path: str

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.system, self.protocol, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def exists(self) -> bool:
        return self._has(self.system.exists)

    def is_file(self) -> bool:
        return self._has(self.system.isfile)

    def is_dir(self) -> bool:
        return self._has(self.system.isdir)

    def read_bytes(self) -> bytes:
        return self.call(self.system.cat_file)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def glob(self, pattern: str) -> Iterator["Remote"]:
        for path in self.call(lambda folder: self.system.glob(f"{folder.rstrip('/')}/{pattern}")):
            yield Remote(self.system, self.protocol, path)

    def call(self, method: Callable[..., Result], **options: Any) -> Result:
        """Returns `method(path, **options)`. Raises FileNotFoundError or OSError, in one line that names the URL."""
        try:
            return method(self.path, **options)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
        except Exception as error:  # each library has its own
            raise OSError(f"{self}: cannot be read: {printable(error) or type(error).__name__}") from error

    def _has(self, is_kind: Callable[[str], bool]) -> bool:
        if self.call(is_kind):
            return True
        with suppress(FileNotFoundError):
            self.call(self.system.info)  # fsspec answers "no" to errors too, and reports them only here
        return False


Place = Path | Remote


def locate(path: "str | os.PathLike[str] | Remote") -> Place:
    """Returns the file or folder that `path` names; a local one is made absolute.

    Raises OSError naming the URL where fsspec lacks the library for its kind (named too), or cannot make sense of it.
    """
    if isinstance(path, Remote):
        return path
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).absolute()
    protocol = text.split("://", 1)[0]
    try:
        system, inner = fsspec.core.url_to_fs(text)
    except Exception as error:  # no library for it, no such protocol, or what the library has against the URL
        raise OSError(f"{printable(text)}: cannot be read here: {printable(error)}") from None
    return Remote(system, protocol, inner)


def size(file: Place) -> int:
    """Returns the number of bytes in `file`. Raises FileNotFoundError or OSError, as `read_into`."""
    return file.call(file.system.size) if isinstance(file, Remote) else file.stat().st_size


def aligned_bytes(nbytes: int) -> np.ndarray:
    """Returns new bytes, uint8 [max(nbytes, 1)], that begin at a page: a CPU device can take them without a copy."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)


def read_into(file: Place, offset: int, into: memoryview) -> int:
    """Fills `into` with the bytes of `file` from `offset` on; returns their number, less where the file ends early.

    Raises OSError where they cannot be had, FileNotFoundError where there is no such file.
    """
    if isinstance(file, Remote):
        data = file.call(file.system.cat_file, start=offset, end=offset + len(into))
        into[: len(data)] = data
        return len(data)
    done = 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        # one call reads 2 GiB at most
        while done < len(into) and (count := os.preadv(descriptor, [into[done:]], offset + done)):
            done += count
    finally:
        os.close(descriptor)
    return done


def sha256(file: Place) -> str:
    """Returns the SHA-256 of a file's bytes, some of which are read at a time. Raises what `read_into` raises."""
    found, nbytes = hashlib.sha256(), size(file)
    block = memoryview(bytearray(min(nbytes, _BLOCK)))
    for offset in range(0, nbytes, _BLOCK):
        found.update(block[: read_into(file, offset, block)])
    return found.hexdigest()


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's values in C order: of a whole published tensor, that of its bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def files_under(folder: Place) -> list[str]:
    """Returns the paths of everything in `folder` that is no folder, relative to it; links are not followed."""
    if isinstance(folder, Remote):
        root = folder.path.rstrip("/") + "/"
        return sorted(path.removeprefix(root) for path in folder.call(folder.system.find))
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names
    )


def identity(file: Place) -> dict[str, Any]:
    """Returns what tells a safetensors file from another without reading it: size, time of its last change (for a URL
    the name that its server gives to this version), digest of its header."""
    nbytes = size(file)
    length = bytearray(8)
    read_into(file, 0, memoryview(length))
    header = bytearray(min(int.from_bytes(length, "little"), nbytes))  # the file may have become another one
    read_into(file, 8, memoryview(header))
    changed = str(file.call(file.system.ukey)) if isinstance(file, Remote) else str(file.stat().st_mtime_ns)
    return {"size": nbytes, "changed": changed, "header": hashlib.sha256(header).hexdigest()}
