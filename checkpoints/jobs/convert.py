"""Converts a published folder to an Orbax checkpoint, chunk by chunk, in the memory of a few chunks.

`forms` says what is read for each chunk and how it is made, `chunk_grid` how its file is laid out, `pipeline` keeps
several at work, `journal` remembers which are done. All happens in a folder beside the destination, named `*.partial`,
which takes the destination's name when everything is there and safe on the disk, Orbax's metadata and our manifest
last. Whatever stops a conversion leaves the partial folder, and the same command goes on from it.
"""

import dataclasses
import errno
import math
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.files import pipeline
from checkpoints.files.new_folder import check_room
from checkpoints.files.pipeline import MEMORY, WORKERS, ByteCounter, Progress
from checkpoints.files.place import Remote, files_under, identity, sha256
from checkpoints.files.writing import aligned_bytes, fsync, write_file, write_whole
from checkpoints.forms import forms
from checkpoints.forms.forms import ChunkTask, Recipe, Rest, RowRange
from checkpoints.jobs import journal
from checkpoints.published.quantization_config import Form
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.published.spellings import open_published
from checkpoints.stored import chunk_grid, companions, manifest
from checkpoints.stored.manifest import JOURNAL, MANIFEST
from checkpoints.stored.names import Contents
from checkpoints.stored.source import published_contents

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a conversion. `whole` is false where shares of other processes are missing. Of this process's share
    of the arrays, `found_bytes` were there before and `made_bytes` are new."""

    destination: Path
    whole: bool
    leaves: int
    tensors: int
    skipped: tuple[str, ...]
    found_bytes: int
    made_bytes: int


def convert(
    src: str | Path | Remote,
    dst: str | Path,
    *,
    experts: Form | None = None,
    dtype: Rest | None = None,
    memory: int = MEMORY,
    workers: int = WORKERS,
    process_index: int = 0,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Writes the published checkpoint in `src`, a folder or URL, to a new folder `dst`. Weights are kept as stored,
    except where `experts` (int4, fp8, bf16) or `dtype` (of the other weights) asks for another form; FP8 becomes bf16
    unless it is asked for (`forms.make_recipe`).

    The process's peak memory stays under `memory` bytes. Of several processes that share the destination's disk, each
    makes its share of the chunks, and the last to finish makes the checkpoint whole. A conversion that was stopped goes
    on; a destination that holds this very conversion is not changed. Restore it with `checkpoints.load`, or without
    any code of ours with `orbax.checkpoint.StandardCheckpointer`.

    Raises ValueError for less memory than a GiB or a process that is none of `num_processes`; FileExistsError for a
    destination or partial folder of something else, or one that the same process of the conversion is writing;
    CheckpointError naming file and tensor for values that cannot be; the errors of `open_published` and
    `source.published_contents`; OSError where the disk is full, or has too little room for this
    process's share (before the first of it is written). The chunks that were made by then stay.
    """
    limit = pipeline.limit(memory)
    if workers < 1 or not 0 <= process_index < num_processes:
        raise ValueError(
            f"{workers} workers, process {process_index} of {num_processes}: expected 1 or more, from 0 on"
        )
    conversion = _Conversion.of(open_published(src), Path(dst).absolute(), experts, dtype)
    if conversion.is_there():
        return conversion.report(whole=True, found=conversion.nbytes(conversion.recipe.tasks()), made=0)
    settings = conversion.source | {"files": conversion.files, "num_processes": num_processes}
    with journal.open_journal(conversion.partial, settings, process_index, conversion.grids) as log:
        share = [task for i, task in enumerate(conversion.recipe.tasks()) if i % num_processes == process_index]
        todo = [task for task in share if not all((chunk.path, chunk.number) in log.done for chunk in task.makes)]
        found = conversion.nbytes(share) - conversion.nbytes(todo)
        count = ByteCounter(conversion.nbytes(share), progress, found)
        check_room(conversion.partial, conversion.nbytes(todo))
        try:
            pipeline.run(todo, _Work(conversion, log, count), lambda task: task.nbytes, workers=workers, limit=limit)
            log.sync()
            whole = conversion.finish(log)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            reason = os.strerror(error.errno)
            raise OSError(f"{conversion.partial}: {reason}; the same command goes on when there is room") from error
    return conversion.report(whole=whole, found=found, made=count.done - found)


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """One conversion. `files` are the identities of the source's shards, `companions` the checksums of the files beside
    them, by name, and `source` is everything that the result depends on."""

    published: Published
    contents: Contents
    recipe: Recipe
    grids: Mapping[str, chunk_grid.ChunkGrid]
    files: Mapping[str, Any]
    companions: Mapping[str, str]
    source: dict[str, Any]
    dst: Path

    @classmethod
    def of(cls, published: Published, dst: Path, experts: Form | None, dtype: Rest | None) -> "_Conversion":
        # digested before any is read, so that a change meanwhile is noticed at the end
        digests = {name: sha256(file) for name, file in companions.find_companions(published.folder).items()}
        found = published_contents(published)
        recipe = forms.make_recipe(published, found, experts, dtype)
        grids = {leaf.path: chunk_grid.chunk_grid(leaf) for leaf in recipe.leaves}
        files = {file.name: identity(file) for file in published.files}
        source = {
            "form": recipe.form,
            "layout": [chunk_grid.CHUNK_BYTES, chunk_grid.PARTS, chunk_grid.PART_BYTES],
            "config": digests["config.json"],
            # a copy of a file is as good, whatever its time
            "files": {name: {**file, "changed": None} for name, file in files.items()},
        }
        return cls(published, found, recipe, grids, files, digests, source, dst)

    @property
    def partial(self) -> Path:
        return self.dst.with_name(self.dst.name + ".partial")

    def nbytes(self, tasks: Any) -> int:
        return sum(self.grids[chunk.path].chunk_bytes for task in tasks for chunk in task.makes)

    def is_there(self) -> bool:
        """Returns whether the destination is this conversion's. Raises FileExistsError where it is something else."""
        if not self.dst.exists():
            return False
        if not (self.dst / MANIFEST).is_file():
            raise FileExistsError(f"{self.dst}: destination exists, and is no checkpoint of ours")
        if difference := journal.differ(manifest.read(self.dst).source, self.source):
            raise FileExistsError(f"{self.dst}: destination exists, of another conversion: {difference}")
        shutil.rmtree(self.dst / JOURNAL, ignore_errors=True)
        return True

    def finish(self, log: journal.Journal) -> bool:
        """Makes the checkpoint whole if every process's chunks are there; returns whether it is whole now."""
        with log.exclusive():
            if self.is_there():  # another process was faster
                return True
            digests = log.all_done()
            if any((path, i) not in digests for path, grid in self.grids.items() for i in range(grid.chunks)):
                return False
            for file in self.published.files:
                if difference := journal.differ(self.files[file.name], identity(file)):
                    raise CheckpointError(f"{file}: changed while it was converted: {difference}")
            from checkpoints.stored.orbax_metadata import write_array_metadata  # half a second of Orbax

            names = write_array_metadata(self.grids, self.partial)
            source, change = self.published.folder, self.recipe.config
            names += companions.copy_companions(source, self.partial, change, self.companions)
            self._remove_all_but(names)
            for path in (self.partial, *self.partial.glob("*"), *self.partial.glob("*/zarr.json")):
                fsync(path)
            values = self.manifest(digests, {name: sha256(self.partial / name) for name in sorted(names)})
            write_whole(self.partial / MANIFEST, manifest.encode(values), self.partial / JOURNAL)
            self.partial.rename(self.dst)
            fsync(self.dst.parent)
        shutil.rmtree(self.dst / JOURNAL, ignore_errors=True)  # another process may be removing it too
        return True

    def _remove_all_but(self, names: Iterable[str]) -> None:
        """Removes files of earlier attempts for which this one has no use: a companion that the source lost, say."""
        chunks = (f"{path}/{name}" for path, grid in self.grids.items() for name in grid.files())
        for name in set(files_under(self.partial)).difference(names, chunks):
            if not name.startswith(f"{JOURNAL}/"):
                (self.partial / name).unlink()

    def manifest(self, digests: Mapping[tuple[str, int], str], files: Mapping[str, str]) -> dict[str, Any]:
        config, skipped = self.contents.config, self.contents.skipped
        return manifest.describe(
            self.published, config.model_type, self.source, skipped, self.recipe.leaves, digests, self.grids, files
        )

    def report(self, *, whole: bool, found: int, made: int) -> Report:
        leaves = self.contents.leaves
        tensors = sum(len(leaf.names) for leaf in leaves)
        return Report(self.dst, whole, len(self.recipe.leaves), tensors, self.contents.skipped, found, made)


class _Work:
    """Makes the chunks of a task: reads, transforms, writes, digests, and only then records them."""

    def __init__(self, conversion: _Conversion, log: journal.Journal, count: ByteCounter):
        self.published, self.grids, self.folder = conversion.published, conversion.grids, conversion.partial
        self.log, self.count, self.thread = log, count, threading.local()
        for path in self.grids:
            (self.folder / path).mkdir(exist_ok=True)
        count(0)

    def __call__(self, task: ChunkTask) -> None:
        for chunk, array in zip(task.makes, task.make(*self._read(task.reads)), strict=True):
            grid = self.grids[chunk.path]
            if array.shape != grid.chunk or array.dtype != grid.dtype:
                raise TypeError(f"{chunk}: made {array.dtype} {array.shape}, expected {grid.dtype} {grid.chunk}")
            write_file(self.folder / chunk.path / grid.file(chunk.number), grid.encode(array))
            self.log.record(chunk.path, chunk.number, journal.digest(array))
            self.count(array.nbytes)

    def _read(self, reads: Sequence[RowRange]) -> list[np.ndarray]:
        """Returns a task's arrays, in memory that the thread's next task reuses: new pages cost as much as copying."""
        sizes = [self._nbytes(rows) + 4095 & ~4095 for rows in reads]
        if getattr(self.thread, "buffer", np.empty(0)).nbytes < sum(sizes):
            self.thread.buffer = aligned_bytes(sum(sizes))
        starts = np.cumsum([0, *sizes])
        return [
            self.published.read(rows.name, rows.start, rows.stop, self.thread.buffer[start:])
            for rows, start in zip(reads, starts, strict=False)
        ]

    def _nbytes(self, rows: RowRange) -> int:
        tensor = self.published.tensors[rows.name]
        if (rows.start, rows.stop) == (0, None):
            return tensor.nbytes
        count = len(range(tensor.shape[0])[rows.start : rows.stop])
        return count * math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
