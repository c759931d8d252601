"""Exports a converted folder as a published one: safetensors in shards, their index, and the files beside them.

Chunks are checked against the manifest's checksums, and written straight to their places in the shards, several at a
time. Names, dtypes and shapes are those of the checkpoint that was converted, and so is every byte of a weight that was
kept in its form. An export that was killed goes on with the shards that are not whole.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from checkpoints.files import pipeline
from checkpoints.files.new_folder import new_folder, was_finished
from checkpoints.files.pipeline import MEMORY, WORKERS, ByteCounter, Progress
from checkpoints.published.endings import shape_name
from checkpoints.published.safetensors import INDEX
from checkpoints.published.shards import SHARD_BYTES, ShardWriter, TensorHeader, split_into_shards
from checkpoints.stored.chunk_file import ChunkFile
from checkpoints.stored.companions import companion_digests, copy_companions
from checkpoints.stored.folder import Converted
from checkpoints.stored.manifest import MANIFEST


@dataclass(frozen=True)
class Exported:
    """The result of an export: `nbytes` of tensors in `shards` files, and the companions that were `carried` along."""

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

    The process's peak memory stays under `memory` bytes, whatever the size of a shard. An export that was killed or
    interrupted leaves `dst.partial`. The same one goes on from there, another one starts over.

    Raises FileNotFoundError for a `src` without our manifest, CheckpointError naming file and tensor for a damaged one,
    FileExistsError for a `dst` that holds anything and for one that another process is writing, OSError naming the file
    where the disk is full, and before the first byte where it has too little room. An error leaves nothing.
    """
    limit = pipeline.limit(memory)
    if shard_bytes < 1 or workers < 1:
        raise ValueError(f"shards of {shard_bytes} bytes, {workers} workers: expected 1 or more")
    source = Converted.open(src)
    names = sorted(source.tensors, key=_natural)
    headers = [TensorHeader(name, source.tensors[name].dtype, source.tensors[name].shape) for name in names]
    shards = split_into_shards(headers, shard_bytes)
    chunks = [chunk for name in names for chunk in source.chunks.get(name, ())]
    manifest = hashlib.sha256((source.folder / MANIFEST).read_bytes()).hexdigest()
    settings = {"export of": manifest, "shard_bytes": shard_bytes}

    def report(carried: tuple[str, ...]) -> Exported:
        return Exported(Path(dst), len(headers), len(shards), sum(header.nbytes for header in headers), carried)

    if was_finished(Path(dst), settings):
        files = sorted(file.name for file in Path(dst).iterdir())
        return report(tuple(name for name in files if name != INDEX and not name.endswith(".safetensors")))
    with new_folder(Path(dst), settings) as folder:
        with ShardWriter(folder, shards) as writer:
            todo = [chunk for chunk in chunks if not writer.finished.issuperset(_tensors(chunk))]
            total, left = (sum(chunk.grid.chunk_bytes for chunk in some) for some in (chunks, todo))
            count = ByteCounter(total, progress, total - left)

            def work(chunk: ChunkFile) -> None:
                writer.write(chunk.name, chunk.read(check=True), chunk.row)
                for shape in _tensors(chunk)[1:]:
                    writer.write(shape, source.weight_shapes[shape])
                count(chunk.grid.chunk_bytes)

            pipeline.run(todo, work, lambda chunk: chunk.nbytes, workers=workers, limit=limit)
        carried = copy_companions(source.folder, folder, expected=companion_digests(source.manifest.files))
    return report(carried)


def _tensors(chunk: ChunkFile) -> tuple[str, ...]:
    """Returns the tensors that are written of a chunk: its own and, after INT4 words, their shape."""
    shape = shape_name(chunk.name, chunk.grid.dtype)
    return (chunk.name,) if shape is None else (chunk.name, shape)


def _natural(name: str) -> list[str | int]:
    """Returns a key by which layer 2 comes before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
