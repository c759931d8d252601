"""Runs `argv[1]` ("convert" or "export") from folder `argv[2]` to `argv[3]`, killed `argv[4]` times at random moments
and begun anew; a process of its own, since it forks. Chunks, or shards, have `argv[5]` bytes.

Prints a JSON line: attempts killed, bytes begun to be written by all attempts, bytes that had to be written. Imports
and the abstract model, which take most of a small work's time, are shared by all attempts.
"""

import functools
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import convert, export
from checkpoints.published.safetensors import Published
from checkpoints.published.shards import ShardWriter
from checkpoints.stored import chunk_grid, names

convert_module = importlib.import_module("checkpoints.jobs.convert")


class Log:
    """A file of the bytes that all attempts have begun to write, which their processes share."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, nbytes: int) -> None:
        os.write(self._descriptor, f"{nbytes}\n".encode())

    def total(self) -> int:
        return sum(map(int, self.path.read_text().split()))


def kill(work: Callable[[], object], log: Log, goal: float, signals: list[signal.Signals]) -> bool:
    """Calls `work` in a process that is killed by one of `signals` soon after the log has reached `goal` bytes. Returns
    whether it was; it may end before."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if log.total() > goal:
            time.sleep(random.random() * 0.01)
            os.kill(child, random.choice(signals))
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)
    return False


def kill_conversions(source: Path, target: Path, kills: int, log: Log) -> tuple[int, int]:
    """Kills conversions evenly over their chunks; returns the number killed and the bytes of all chunks."""
    conversion = convert_module._Conversion.of(Published.open(source), target, None, None)
    total = conversion.nbytes(conversion.recipe.tasks())
    write = convert_module.write_file

    def slow_write(file: Path, pieces: list) -> None:
        log.add(sum(piece.nbytes for piece in pieces))
        write(file, [piece[: piece.nbytes // 2] for piece in pieces])
        time.sleep(random.random() * 0.01)  # half of it is there
        write(file, pieces)

    convert_module.write_file = slow_write
    work, killed = functools.partial(convert, source, target, workers=2), 0
    for attempt in range(kills):
        goal = total * (attempt + random.random()) / (kills + 1)
        killed += kill(work, log, goal, [signal.SIGKILL])
        assert not target.exists()
    report = work()
    assert report.whole and report.found_bytes > 0
    return killed, total


def kill_exports(source: Path, target: Path, kills: int, log: Log, shard_bytes: int) -> tuple[int, int]:
    """Kills exports some shards later each time; returns the number killed and the bytes of the tensors."""
    write = ShardWriter.write

    def slow_write(self: ShardWriter, name: str, block: Any, row: int = 0) -> None:
        if name not in self.finished:
            log.add(block.nbytes)
            time.sleep(random.random() * 0.004)
        write(self, name, block, row)

    work = functools.partial(export, source, target, shard_bytes=shard_bytes, workers=2)
    ShardWriter.write = slow_write
    total, killed = sum(file.stat().st_size for file in source.glob("*/c*")), 0
    while killed < kills and not target.exists():
        # what a killed attempt wrote of unfinished shards is written again
        goal = log.total() + total * random.random() / kills
        killed += kill(work, log, goal, [signal.SIGKILL, signal.SIGTERM])
    return killed, work().nbytes


def main(kind: str, source: Path, target: Path, kills: int, nbytes: int) -> None:
    random.seed(0)
    names.abstract = functools.cache(names.abstract)
    log = Log(target.with_name("begun"))
    if kind == "convert":
        chunk_grid.CHUNK_BYTES = nbytes
        killed, total = kill_conversions(source, target, kills, log)
    else:
        killed, total = kill_exports(source, target, kills, log, nbytes)
    print(json.dumps({"killed": killed, "begun": log.total(), "total": total}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of every fork
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
