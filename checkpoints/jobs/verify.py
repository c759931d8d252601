"""Verifies that two checkpoints hold the same, or that one still holds what was converted, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path

from checkpoints.files import pipeline
from checkpoints.files.pipeline import MEMORY, WORKERS, ByteCounter, Progress
from checkpoints.files.place import locate
from checkpoints.jobs.compare import Compare, Finding
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.published.spellings import open_published
from checkpoints.stored.checks import Check, checks
from checkpoints.stored.folder import Converted
from checkpoints.stored.manifest import MANIFEST


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
    """Compares checkpoint `a` with `b`, each published or converted. Without `b`, checks every byte of `a`'s folder
    against the checksums that were written when it was converted, and the manifest that has them against config.json.

    Without a `tolerance`, tensors must agree in name, dtype, shape and every byte. With one, weights are compared by
    value, whatever their forms (INT4, FP8, floats; read as float32): in every weight the largest error must be at most
    `tolerance` times the largest magnitude in `b`. Peak memory stays under `memory`.

    Raises FileNotFoundError where there is no checkpoint, CheckpointError for files that cannot be read at all, a
    damaged manifest among them.
    """
    if tolerance is not None and (b is None or not 0 <= tolerance < float("inf")):
        raise ValueError(f"tolerance {tolerance}: expected a number from 0, and two checkpoints to compare")
    limit = pipeline.limit(memory)
    if b is None:
        return Verdict(tuple(_checksums(Converted.open(a), workers, limit, progress)))
    left, right = _open(a), _open(b)
    found = Compare(left, right, tolerance, progress).run(workers, limit)
    return Verdict(tuple(found))


def _open(path: str | Path) -> Published | Converted:
    return Converted.open(path) if (locate(path) / MANIFEST).is_file() else open_published(path)


def _checksums(converted: Converted, workers: int, limit: int, progress: Progress | None) -> list[Finding]:
    todo = checks(converted)
    problems: dict[str, str] = {}
    count = ByteCounter(sum(check.nbytes for check in todo), progress)

    def work(check: Check) -> None:
        try:
            check.run()
        except CheckpointError as error:
            problems[check.name] = str(error)
        count(check.nbytes)

    pipeline.run(todo, work, lambda check: check.memory, workers=workers, limit=limit)
    if not problems:  # a damaged config.json has been found already
        try:
            _ = converted.contents  # raises where the manifest and config.json differ
        except ValueError as error:
            problems[MANIFEST] = str(error)
    return [Finding(name, problems.get(name, "")) for name in dict.fromkeys([*(c.name for c in todo), MANIFEST])]
