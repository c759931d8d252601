"""Tools that list, read and search the files of one folder, and reach nothing outside it."""

import contextlib
import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from pathlib import Path

from kimi_jax.agents.tools import Tool, ToolError, tool

ENTRIES = 1_000  # of a listing
LINES = 1_000  # of a file in one result
FILE_SIZE = 10_000_000  # bytes of a file that is read
MATCHES, VISITED = 200, 10_000  # lines found, and files looked into, by one search
LINE = 300  # characters of a line found


def files(folder: str | Path) -> list[Tool]:
    """Returns the tools `list_files`, `read_file` and `search_files` of a folder.

    Paths that a model gives are relative to the folder. Neither `..` nor a link leads out of it: links are not
    followed, not even at the moment of opening. Raises NotADirectoryError where the folder is none.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")

    def list_files(path: str = ".") -> str:
        """Lists a folder: a line for each entry, folders with a slash at the end, files with their size in bytes."""
        with _opened(root, path) as handle:
            if not stat.S_ISDIR(os.fstat(handle).st_mode):
                raise ToolError(f"{path}: not a folder")
            names = sorted(os.listdir(handle))
            shown = [_entry(handle, name) for name in names[:ENTRIES]]
        more = [f"[{len(names) - ENTRIES} more]"] if len(names) > ENTRIES else []
        return "\n".join([*shown, *more]) or "the folder is empty"

    def read_file(path: str, first_line: int = 1) -> str:
        """Returns up to 1,000 lines of a text file, from `first_line` on, which counts from 1."""
        with _opened(root, path) as handle:
            lines = _lines(_text(handle, path))
        begin = max(first_line, 1) - 1
        shown, left = lines[begin : begin + LINES], len(lines) - begin - LINES
        return "\n".join([*shown, *([f"[{left} more lines]"] if left > 0 else [])])

    def search_files(text: str, path: str = ".") -> str:
        """Finds the lines that hold a text, in upper or lower case, in a file or in all files under a folder."""
        if not text:
            raise ToolError("the text to search for is empty")
        found: list[str] = []
        for number, (name, content) in enumerate(_texts(root, path)):
            if number == VISITED:
                return "\n".join([*found, f"[only {VISITED} files are searched; search in a folder below]"])
            for line, one in enumerate(_lines(content), 1):
                if text.casefold() in one.casefold():
                    if len(found) == MATCHES:
                        return "\n".join([*found, f"[more than {MATCHES} lines; search for less]"])
                    shown = os.fsencode(name).decode("utf-8", "replace")
                    found.append(f"{shown}:{line}: {one[:LINE]}")
        return "\n".join(found) or "nothing is found"

    return [tool(one) for one in (list_files, read_file, search_files)]


@contextlib.contextmanager
def _opened(root: Path, path: str) -> Iterator[int]:
    """Opens a file or folder below `root` step by step, so that no link is followed.

    Raises ToolError where `path` leads out, is a link or does not exist.
    """
    clean = posixpath.normpath(path)
    if clean.split("/")[0] in ("", ".."):
        raise ToolError(f"{path}: outside the folder; paths are relative to it")
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in clean.split("/"):
            # A named pipe would block without O_NONBLOCK
            below = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
            os.close(handle)
            handle = below
        yield handle
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: {_why(error)}") from None
    finally:
        os.close(handle)


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "no path"
    # ELOOP is the answer to O_NOFOLLOW
    return "a link, which is not followed" if error.errno == errno.ELOOP else str(error.strerror).lower()


def _entry(folder: int, name: str) -> str:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    shown = os.fsencode(name).decode("utf-8", "replace")
    if stat.S_ISDIR(found.st_mode):
        return f"{shown}/"
    return f"{shown} (link)" if stat.S_ISLNK(found.st_mode) else f"{shown} ({found.st_size} bytes)"


def _lines(text: str) -> list[str]:
    """Returns the lines as editors number them."""
    return text.removesuffix("\n").split("\n")


def _text(handle: int, path: str) -> str:
    """Returns the text of an open file. Raises ToolError where it is none."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise ToolError(f"{path}: not a file")
    with open(os.dup(handle), "rb") as file:
        data = file.read(FILE_SIZE + 1)
    if len(data) > FILE_SIZE:
        raise ToolError(f"{path}: longer than {FILE_SIZE} bytes")
    if b"\0" in data:
        raise ToolError(f"{path}: not a text")
    return data.decode("utf-8", "replace")


def _texts(root: Path, path: str) -> Iterator[tuple[str, str]]:
    """Yields the names and contents of text files at and below `path`, in order; passes over links and other files."""
    with _opened(root, path) as handle:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            yield path, _text(handle, path)
            return
        names = sorted(os.listdir(handle))
    for name in names:
        with contextlib.suppress(ToolError):
            yield from _texts(root, posixpath.normpath(f"{path}/{name}"))
