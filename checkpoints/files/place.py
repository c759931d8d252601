"""Folders on disk or behind a URL, and byte ranges of their files.

Ranges come by pread straight into the caller's array: mapped pages would count as resident memory. URLs (`gs://`,
`s3://`, `hf://`) go through fsspec, where the library of their kind is installed (gcsfs, s3fs, huggingface_hub).
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

_BLOCK = 2**23  # bytes that are digested at a time


@dataclass(frozen=True)
class Remote:
    """A file or folder behind a URL, with the few methods of a Path that reading a checkpoint takes."""

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
        return self.system.exists(self.path)

    def is_file(self) -> bool:
        return self.system.isfile(self.path)

    def is_dir(self) -> bool:
        return self.system.isdir(self.path)

    def read_bytes(self) -> bytes:
        return self.system.cat_file(self.path)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def glob(self, pattern: str) -> Iterator["Remote"]:
        for path in self.system.glob(f"{self.path.rstrip('/')}/{pattern}"):
            yield Remote(self.system, self.protocol, path)


Place = Path | Remote


def at(path: "str | os.PathLike[str] | Remote") -> Place:
    """The file or folder that `path` names; a local one is made absolute.

    Raises OSError naming the library to install where fsspec lacks it for this kind of URL.
    """
    if isinstance(path, Remote):
        return path
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).absolute()
    protocol = text.split("://", 1)[0]
    try:
        system, inner = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:  # no library for it, or no such protocol
        raise OSError(f"{text}: cannot be read here: {error}") from None
    return Remote(system, protocol, inner)


def size(file: Place) -> int:
    return file.system.size(file.path) if isinstance(file, Remote) else file.stat().st_size


def read_into(file: Place, offset: int, into: memoryview) -> int:
    """Fills `into` with the bytes of `file` from `offset` on; gives their number, less where the file ends early.

    Raises OSError where they cannot be had, FileNotFoundError where there is no such file.
    """
    if isinstance(file, Remote):
        try:
            data = file.system.cat_file(file.path, start=offset, end=offset + len(into))
        except FileNotFoundError:
            raise
        except Exception as error:  # each library has its own
            raise OSError(f"{file}: cannot be read: {error}") from error
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


def files_under(folder: Place) -> list[str]:
    """Returns the paths of all that is in `folder` and is no folder, relative to it; links are not followed."""
    if isinstance(folder, Remote):
        root = folder.path.rstrip("/") + "/"
        return sorted(path.removeprefix(root) for path in folder.system.find(folder.path))
    return sorted(
        os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names
    )


def identity(file: Place) -> dict[str, Any]:
    """Returns what tells a safetensors file from another without reading it: size, time of its last change (for a URL
    the name that its server gives to this version), digest of its header."""
    nbytes = size(file)
    length = bytearray(8)
    read_into(file, 0, memoryview(length))
    header = bytearray(min(int.from_bytes(length, "little"), nbytes))  # the file may have become another one
    read_into(file, 8, memoryview(header))
    changed = str(file.system.ukey(file.path)) if isinstance(file, Remote) else str(file.stat().st_mtime_ns)
    return {"size": nbytes, "changed": changed, "header": hashlib.sha256(header).hexdigest()}
