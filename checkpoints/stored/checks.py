"""Every check of a converted folder against its manifest: each chunk, each other file, and that there are no more."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from checkpoints.files import pipeline
from checkpoints.files.place import files_under, sha256
from checkpoints.published.safetensors import CheckpointError
from checkpoints.stored.folder import Converted
from checkpoints.stored.manifest import JOURNAL, MANIFEST
from kimi_jax.printable import printable


@dataclass(frozen=True)
class Check:
    """The check of one tensor's chunk or of one file, called `name`. `run` raises CheckpointError saying what is wrong
    with it; it takes `memory` bytes meanwhile, and reads `nbytes` of an array."""

    name: str
    run: Callable[[], None]
    memory: int = 2**23  # `sha256` reads blocks of this size
    nbytes: int = 0


def checks(converted: Converted) -> list[Check]:
    """Returns the checks of a folder: chunks, other files, and one that fails for every file that is not known.

    Warns where the manifest is of an older version, which has checksums of chunks alone.
    """
    folder, files = converted.folder, converted.manifest.files
    found = [
        Check(chunk.name, chunk.check, chunk.nbytes, chunk.grid.chunk_bytes)
        for chunks in converted.chunks.values()
        for chunk in chunks
    ]
    if files is None:
        file = folder / MANIFEST
        warnings.warn(f"{file}: is of an older version, so files besides arrays have no checksums", stacklevel=3)
        return found
    found += [Check(name, partial(_check_file, converted, name, digest)) for name, digest in files.items()]
    records = converted.manifest.leaves.items()
    chunk_names = {f"{path}/{name}" for path, record in records for name in record.grid.files()}
    strangers = sorted(set(files_under(folder)) - files.keys() - {MANIFEST} - chunk_names)
    strangers = [name for name in strangers if not name.startswith(f"{JOURNAL}/")]
    return found + [Check(name, partial(_refuse, converted, name)) for name in strangers]


def run_share(converted: Converted, *, process_index: int = 0, num_processes: int = 1) -> None:
    """Runs this process's share of a folder's checks. Raises CheckpointError naming file and tensor of the first that
    fails."""
    share = checks(converted)[process_index::num_processes]
    limit = pipeline.limit(pipeline.MEMORY)
    pipeline.run(share, lambda check: check.run(), lambda check: check.memory, workers=pipeline.WORKERS, limit=limit)


def _check_file(converted: Converted, name: str, expected: str) -> None:
    file = converted.folder / name
    if not file.is_file():
        raise CheckpointError(f"{file}: is not there")
    if sha256(file) != expected:
        raise CheckpointError(f"{file}: is not what was converted: its checksum differs")


def _refuse(converted: Converted, name: str) -> None:
    file = printable(converted.folder / name)
    raise CheckpointError(f"{file}: is no part of the checkpoint: {MANIFEST} does not name it")
