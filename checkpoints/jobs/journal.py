"""The journal of a conversion: the finished chunks, so that the same command goes on from there, whatever stopped it.

In the folder `.conversion` of the partial checkpoint: `settings.json`, with which the conversion was begun;
`journal-I.jsonl` of process I, a line for every chunk that is written; `lock-I`, held while process I runs.

A line is written after its chunk, which is enough when a process is killed. When the power fails, a line may be on the
disk and its chunk not. Chunks are therefore synced some hundred MB at a time, and then a mark is written that says how
many lines are safe. Lines after the last mark are believed only where their chunks have the bytes that they name.
"""

import errno
import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.files.lock import hold_lock
from checkpoints.files.place import digest
from checkpoints.files.writing import fsync
from checkpoints.published.safetensors import CheckpointError
from checkpoints.stored.chunk_grid import ChunkGrid
from checkpoints.stored.manifest import JOURNAL
from kimi_jax import json_reader

SYNC_BYTES = 256 * 2**20


class Journal:
    """The chunks that process `index` has finished of the conversion in folder `partial`. `done` has the digest of each
    by leaf and number. Several threads may call the methods."""

    def __init__(self, partial: Path, index: int, grids: Mapping[str, ChunkGrid]):
        self.partial, self.grids = partial, grids
        self.path = partial / JOURNAL / f"journal-{index}.jsonl"
        self._lock, self._syncing = threading.Lock(), threading.Lock()
        self._unsynced: list[tuple[str, int]] = []
        self._unsynced_bytes = 0
        lines, safe, self._end = _read(self.path)
        self._lines = len(lines)
        self.done: dict[tuple[str, int], str] = {}
        for number, (path, chunk, sha256) in enumerate(lines):
            if self._is_there(path, chunk, None if number < safe else sha256):
                self.done[path, chunk] = sha256
                if number >= safe:
                    self._unsynced.append((path, chunk))
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(self._file, self._end)  # the last line may be half written
        self._all = os.open(self.path.with_name("lock"), os.O_RDWR | os.O_CREAT)
        self.sync()

    def record(self, path: str, chunk: int, sha256: str) -> None:
        """Notes that chunk number `chunk` of the leaf at `path` is written."""
        nbytes = self.grids[path].chunk_bytes
        with self._lock:
            self._append([path, chunk, sha256])
            self._lines += 1
            self.done[path, chunk] = sha256
            self._unsynced.append((path, chunk))
            self._unsynced_bytes += nbytes
            enough = self._unsynced_bytes >= SYNC_BYTES
            if enough:
                self._unsynced_bytes = 0
        if enough:
            self.sync()

    def sync(self) -> None:
        """Returns when every chunk that was recorded before is safe from a loss of power."""
        with self._syncing:
            with self._lock:
                chunks, self._unsynced, lines = self._unsynced, [], self._lines
            for path, chunk in chunks:
                fsync(self.partial / path / self.grids[path].file(chunk))
            for folder in {path for path, _ in chunks}:
                fsync(self.partial / folder)
            with self._lock:
                self._append({"synced": lines})
            os.fsync(self._file)

    def all_done(self) -> dict[tuple[str, int], str]:
        """Returns the digests of the chunks that all processes have finished and that are safe, by leaf and number."""
        done: dict[tuple[str, int], str] = {}
        for path in sorted(self.path.parent.glob("journal-*.jsonl")):
            lines, safe, _ = _read(path)
            done |= {(path, chunk): sha256 for path, chunk, sha256 in lines[:safe]}
        return {key: sha256 for key, sha256 in done.items() if self._is_there(*key, None)}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lets one process of the conversion in at a time, even when another has moved the folder by then."""
        fcntl.flock(self._all, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._all, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._file)
        os.close(self._all)

    def _append(self, value: Any) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        if (written := os.pwrite(self._file, line, self._end)) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._end += written

    def _is_there(self, path: str, chunk: int, sha256: str | None) -> bool:
        grid = self.grids.get(path)
        if grid is None or chunk >= grid.chunks:
            return False
        file = self.partial / path / grid.file(chunk)
        if not file.is_file() or file.stat().st_size != grid.file_bytes:
            return False
        return sha256 is None or digest(grid.decode(np.fromfile(file, np.uint8))) == sha256


def _read(path: Path) -> tuple[list[tuple[str, int, str]], int, int]:
    """Returns the lines of a journal up to the first that is not whole or that no journal has, how many of them are
    safe, and the byte where they end."""
    lines: list[tuple[str, int, str]] = []
    safe = end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            value = json_reader.parse(line, str(path)) if line.endswith(b"\n") else None
        except json_reader.JSONError:
            break
        match value:
            case {"synced": int(count)} if 0 <= count <= len(lines):
                safe = count
            case [str(leaf), int(chunk), str(sha256)] if chunk >= 0:
                lines.append((leaf, chunk, sha256))
            case _:
                break
        end += len(line)
    return lines, safe, end


@contextmanager
def open_journal(
    partial: Path, settings: Mapping[str, Any], index: int, grids: Mapping[str, ChunkGrid]
) -> Iterator[Journal]:
    """Opens the journal of process `index` of the conversion in `partial`, begun with `settings` now or before.

    Raises FileExistsError where `partial` is of something else, was begun with other settings or from files that have
    changed since, or where the same process of the conversion is running already; CheckpointError where its settings
    cannot be read.
    """
    folder = partial / JOURNAL
    if partial.exists() and not folder.exists() and any(partial.iterdir()):
        raise FileExistsError(f"{partial}: is in the way, and no conversion; move it elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    _agree(partial, settings)
    with hold_lock(folder / f"lock-{index}", f"{partial}: process {index} of this conversion is running"):
        journal = Journal(partial, index, grids)
        try:
            yield journal
        finally:
            journal.close()


def _agree(partial: Path, settings: Mapping[str, Any]) -> None:
    path = partial / JOURNAL / "settings.json"
    descriptor, name = tempfile.mkstemp(prefix="settings-", dir=partial / JOURNAL)
    new = Path(name)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(settings, stream, indent=1)
    fsync(new)
    try:
        os.link(new, path)  # a link is made whole or not at all, and by one process only
    except FileExistsError:
        before, now = (json_reader.read_object(file, error=CheckpointError) for file in (path, new))
        if difference := differ(before, now):
            raise FileExistsError(
                f"{partial}: was begun otherwise: {difference}; go on as it was begun, or remove it"
            ) from None
    finally:
        new.unlink()


def differ(before: Any, now: Any, where: str = "") -> str:
    """Returns the first place where two JSON values differ, in words; an empty text where they do not."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if found := differ(before.get(key), now.get(key), f"{where} {key}".strip()):
                return found
        return ""
    return "" if before == now else f"{where} was {before}, is {now}"
