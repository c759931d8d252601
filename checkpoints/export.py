"""An Orbax checkpoint of ours -> a published folder: safetensors in shards, their index, and what goes along.

Chunks are held against the manifest's checksums on their way, and go straight to their places in the shards, several
at a time. Names, dtypes and shapes are those of the checkpoint that was converted, and so is every byte of what was
kept in its form.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from checkpoints import pipeline
from checkpoints.converted import Chunk, Converted
from checkpoints.files import new_folder
from checkpoints.metadata import carry, recorded
from checkpoints.names import PACKED, SHAPE
from checkpoints.pipeline import MEMORY, WORKERS
from checkpoints.progress import Counter, Progress
from checkpoints.shards import SHARD_BYTES, Entry, ShardWriter, planned


@dataclass(frozen=True)
class Exported:
    """What an export wrote: `nbytes` of tensors in `shards` files, and the files `carried` along."""

    destination: Path
    tensors: int
    shards: int
    nbytes: int
    carried: tuple[str, ...]


def export(
    src: str | Path,
    dst: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    memory: int = MEMORY,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Exported:
    """Writes the checkpoint in folder `src`, which `convert` wrote, to a new folder `dst` as it would be published.

    The process's peak memory stays under `memory` bytes, whatever the size of a shard. Raises FileNotFoundError for a
    `src` without our manifest, CheckpointError naming file and tensor for a damaged one, FileExistsError for a `dst`
    (or `dst.partial`) that holds anything, OSError naming the file where the disk is full. An error leaves nothing.
    """
    limit = pipeline.limit(memory)
    if shard_bytes < 1 or workers < 1:
        raise ValueError(f"shards of {shard_bytes} bytes, {workers} workers: expected 1 or more")
    source = Converted.open(src)
    names = sorted(source.tensors, key=_natural)
    entries = [Entry(name, source.tensors[name].dtype, source.tensors[name].shape) for name in names]
    shards = planned(entries, shard_bytes)
    chunks = [chunk for name in names for chunk in source.chunks.get(name, ())]
    count = Counter(sum(chunk.layout.chunk_bytes for chunk in chunks), progress)

    with new_folder(Path(dst)) as folder:
        with ShardWriter(folder, shards) as writer:

            def work(chunk: Chunk) -> None:
                writer.write(chunk.name, chunk.read(check=True), chunk.row)
                if chunk.name.endswith(PACKED):
                    shape = chunk.name.removesuffix(PACKED) + SHAPE
                    writer.write(shape, source.weight_shapes[shape])
                count(chunk.layout.chunk_bytes)

            pipeline.run(chunks, work, lambda chunk: chunk.nbytes, workers=workers, limit=limit)
        carried = carry(source.folder, folder, expected=recorded(source.manifest))
    return Exported(Path(dst), len(entries), len(shards), sum(entry.nbytes for entry in entries), carried)


def _natural(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
