"""Do two checkpoints hold the same? And does one still hold what was converted? Streaming, tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints import pipeline
from checkpoints.compare import Compare, Finding
from checkpoints.converted import Chunk, Converted
from checkpoints.metadata import MANIFEST
from checkpoints.pipeline import MEMORY, WORKERS
from checkpoints.progress import Counter, Progress
from checkpoints.reading import Remote
from checkpoints.safetensors import CheckpointError, Published
from checkpoints.spellings import open_published


@dataclass(frozen=True)
class Verdict:
    """The findings, all tensors of either side, in A's order."""

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
    """Holds checkpoint `a` against `b`, each published or converted; without `b`, against the checksums that were
    written when `a` was converted.

    Exactly: the same tensors by name, dtype, shape and every byte. With a `tolerance`, weights by value, whatever their
    forms (INT4, FP8, floats; read as float32): in every weight the largest error is at most `tolerance` times the
    largest magnitude in `b`. Peak memory stays under `memory`.

    Raises FileNotFoundError where there is no checkpoint, CheckpointError for files that cannot be read at all.
    """
    if tolerance is not None and (b is None or not 0 <= tolerance < float("inf")):
        raise ValueError(f"tolerance {tolerance}: expected a number from 0, and two checkpoints to compare")
    limit = pipeline.limit(memory)
    if b is None:
        return Verdict(tuple(_checksums(Converted.open(a), workers, limit, progress)))
    left, right = _open(a), _open(b)
    found = Compare(left, right, tolerance, progress).run(workers, limit)
    return Verdict(tuple(found))


def check(path: str | Path | Remote, *, process_index: int = 0, num_processes: int = 1) -> None:
    """This process's share of the chunks of the converted checkpoint in `path`, against their checksums.

    Raises CheckpointError naming file and tensor of what is damaged, FileNotFoundError where there is no manifest.
    """
    chunks = [chunk for parts in Converted.open(path).chunks.values() for chunk in parts]
    share = chunks[process_index::num_processes]

    def work(chunk: Chunk) -> None:
        chunk.read(check=True)

    pipeline.run(share, work, lambda chunk: chunk.nbytes, workers=WORKERS, limit=pipeline.limit(MEMORY))


def _open(path: str | Path) -> Published | Converted:
    return Converted.open(path) if (Path(path) / MANIFEST).is_file() else open_published(path)


def _checksums(source: Converted, workers: int, limit: int, progress: Progress | None) -> Iterator[Finding]:
    chunks = [chunk for parts in source.chunks.values() for chunk in parts]
    problems: dict[str, str] = {}
    count = Counter(sum(chunk.layout.chunk_bytes for chunk in chunks), progress)

    def work(chunk: Chunk) -> None:
        try:
            chunk.read(check=True)
        except CheckpointError as error:
            problems[chunk.name] = str(error)
        count(chunk.layout.chunk_bytes)

    pipeline.run(chunks, work, lambda chunk: chunk.nbytes, workers=workers, limit=limit)
    for name in source.chunks:
        yield Finding(name, problems.get(name, ""))
