"""Do two checkpoints hold the same? And does one still hold what was converted? Streaming, tensor by tensor."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoints.files import pipeline
from checkpoints.files.pipeline import MEMORY, WORKERS
from checkpoints.files.place import Remote, at, files_under, sha256
from checkpoints.files.progress import Counter, Progress
from checkpoints.jobs.compare import Compare, Finding
from checkpoints.jobs.journal import FOLDER
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.published.spellings import open_published
from checkpoints.stored import manifest
from checkpoints.stored.folder import Converted
from checkpoints.stored.manifest import MANIFEST, Manifest
from kimi_jax.printable import printable


@dataclass(frozen=True)
class Verdict:
    """The findings: all tensors of either side, in A's order; or those of a checkpoint alone, then its other files."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.problem)


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    tolerance: float | None = None,
    memory: int = MEMORY,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Verdict:
    """Holds checkpoint `a` against `b`, each published or converted; without `b`, every byte of `a`'s folder against
    the checksums that were written when it was converted, and the manifest that has them against config.json.

    Exactly: the same tensors by name, dtype, shape and every byte. With a `tolerance`, weights by value, whatever their
    forms (INT4, FP8, floats; read as float32): in every weight the largest error is at most `tolerance` times the
    largest magnitude in `b`. Peak memory stays under `memory`.

    Raises FileNotFoundError where there is no checkpoint, CheckpointError for files that cannot be read at all, a
    damaged manifest among them.
    """
    if tolerance is not None and (b is None or not 0 <= tolerance < float("inf")):
        raise ValueError(f"tolerance {tolerance}: expected a number from 0, and two checkpoints to compare")
    limit = pipeline.limit(memory)
    if b is None:
        return Verdict(tuple(_checksums(manifest.read(at(a)), workers, limit, progress)))
    left, right = _open(a), _open(b)
    found = Compare(left, right, tolerance, progress).run(workers, limit)
    return Verdict(tuple(found))


def check(path: str | Path | Remote, *, process_index: int = 0, num_processes: int = 1) -> None:
    """Holds this process's share of the files of the converted checkpoint in `path` against their checksums.

    Raises CheckpointError naming file and tensor of what is damaged, FileNotFoundError where there is no manifest.
    """
    share = _checks(manifest.read(at(path)))[process_index::num_processes]
    pipeline.run(share, lambda one: one.run(), lambda one: one.held, workers=WORKERS, limit=pipeline.limit(MEMORY))


def _open(path: str | Path) -> Published | Converted:
    return Converted.open(path) if (at(path) / MANIFEST).is_file() else open_published(path)


@dataclass(frozen=True)
class _Check:
    """One tensor's chunk or one file, by name. `run` raises CheckpointError saying what is wrong with it; it holds
    `held` bytes of memory meanwhile, and reads `nbytes` of an array."""

    name: str
    run: Callable[[], None]
    held: int = 2**23
    nbytes: int = 0


def _checks(found: Manifest) -> list[_Check]:
    """Returns what there is to hold against a manifest: every chunk, every other file, and that there are no more."""
    checks = [
        _Check(chunk.name, chunk.check, chunk.nbytes, chunk.grid.chunk_bytes)
        for chunks in Converted.of(found).chunks.values()
        for chunk in chunks
    ]
    if found.files is None:
        file = found.folder / MANIFEST
        warnings.warn(f"{file}: is of an older version, so files besides arrays have no checksums", stacklevel=3)
        return checks
    checks += [_Check(name, partial(_check_file, found, name)) for name in found.files]
    strangers = set(files_under(found.folder)) - found.files.keys() - {MANIFEST}
    strangers -= {
        f"{path}/{record.grid.file(number)}"
        for path, record in found.leaves.items()
        for number in range(record.grid.chunks)
    }
    return checks + [
        _Check(name, partial(_refuse, found, name)) for name in sorted(strangers) if not name.startswith(f"{FOLDER}/")
    ]


def _check_file(found: Manifest, name: str) -> None:
    file = found.folder / name
    if not file.is_file():
        raise CheckpointError(f"{file}: is not there")
    if sha256(file) != (found.files or {})[name]:
        raise CheckpointError(f"{file}: is not what was converted: its checksum differs")


def _refuse(found: Manifest, name: str) -> None:
    file = printable(found.folder / name)
    raise CheckpointError(f"{file}: is no part of the checkpoint: {MANIFEST} does not name it")


def _checksums(found: Manifest, workers: int, limit: int, progress: Progress | None) -> list[Finding]:
    checks = _checks(found)
    problems: dict[str, str] = {}
    count = Counter(sum(one.nbytes for one in checks), progress)

    def work(one: _Check) -> None:
        try:
            one.run()
        except CheckpointError as error:
            problems[one.name] = str(error)
        count(one.nbytes)

    pipeline.run(checks, work, lambda one: one.held, workers=workers, limit=limit)
    if not problems:  # with config.json damaged, what it asks for says nothing
        try:
            found.contents()
        except ValueError as error:
            problems[MANIFEST] = str(error)
    return [Finding(name, problems.get(name, "")) for name in dict.fromkeys([*(one.name for one in checks), MANIFEST])]
