"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name when the block is done. On any error, nothing is
    left behind.

    Raises FileExistsError if `folder` is there and holds anything, or a `*.partial` that another writer is filling.
    """
    _check_empty(folder)
    partial = folder.absolute().with_name(folder.absolute().name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise FileExistsError(f"{partial}: another process is writing it or was killed; if so, remove it") from None
    try:
        yield partial
        _check_empty(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: destination exists and is not empty")
