"""New folders, which appear whole or not at all, whatever stops their writer; and a check of the disk's room."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.files.lock import hold_lock
from checkpoints.files.writing import fsync, write_whole
from kimi_jax import json_reader

STATE = ".writing"  # in a folder that is being written: its lock and its settings


@contextmanager
def new_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a folder beside `folder`, named `*.partial`, to write into. It takes the name of `folder` when the block
    is done and everything is safe from a loss of power.

    An error removes it. A writer that is killed or interrupted leaves it: the next one finds the files in it if its
    `settings`, which decide every byte of the result, are the same, and none if they are not. A writer must therefore
    give a file its name only when the file is whole.

    Raises FileExistsError if `folder` is there and holds anything, while another process writes it, and for a
    `*.partial` that does not come from here.
    """
    _check_empty(folder)
    settings = json.loads(json.dumps(settings))  # as it is read again
    partial = folder.absolute().with_name(folder.absolute().name + ".partial")
    state = partial / STATE
    if partial.is_symlink() or (partial.exists() and not state.is_dir() and any(partial.iterdir())):
        raise FileExistsError(f"{partial}: is in the way, and not what an interrupted writer left; move it elsewhere")
    state.mkdir(parents=True, exist_ok=True)
    with hold_lock(state / "lock", f"{partial}: another process is writing it"):
        try:
            _check_empty(folder)  # another process may have finished it meanwhile
            if _settings(state) != settings:
                for path in partial.iterdir():
                    if path != state:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                write_whole(state / "settings.json", json.dumps(settings).encode(), partial)
            yield partial
            for path in (*partial.iterdir(), partial):
                fsync(path)
            _check_empty(folder)
            partial.rename(folder)
            fsync(folder.absolute().parent)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder / STATE, ignore_errors=True)


def was_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Returns whether a writer with these `settings` was killed right after `folder` got its name, so that it is whole,
    and if so removes the state that the writer could not."""
    state = folder / STATE
    if not state.is_dir() or _settings(state) != json.loads(json.dumps(settings)):
        return False
    shutil.rmtree(state)
    return True


def check_room(folder: Path, nbytes: int) -> None:
    """Raises OSError, with both numbers, where `nbytes` are more than the free bytes of the disk for `folder`."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(nearest)
    if usage.total and nbytes > usage.free:  # some file systems over a network know of no size
        reason = os.strerror(errno.ENOSPC)
        raise OSError(f"{folder}: {reason}: {nbytes:,} bytes are to be written, {usage.free:,} are free")


def _settings(state: Path) -> dict[str, Any] | None:
    try:
        return json_reader.read_object(state / "settings.json")
    except (FileNotFoundError, json_reader.JSONError):
        return None


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: destination exists and is not empty")
