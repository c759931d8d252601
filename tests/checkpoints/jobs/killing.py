"""Converts `argv[1]` to `argv[2]` in chunks of `argv[4]` bytes, killed by SIGKILL `argv[3]` times at random moments and
begun anew; a process of its own, since it forks. Prints a JSON line: bytes of chunks begun to be written by all
attempts, those there are, and attempts killed.

Imports and the abstract model, which take most of a small conversion's time, are shared by all attempts.
"""

import functools
import importlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

from checkpoints import convert
from checkpoints.stored import chunk_grid, names

convert_module = importlib.import_module("checkpoints.jobs.convert")


def main(source: Path, target: Path, kills: int) -> None:
    random.seed(0)
    begun = os.open(target.with_name("begun"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    names.abstract = functools.cache(names.abstract)
    conversion = convert_module._Conversion.of(convert_module.Published.open(source), target, None, None)
    total = conversion.nbytes(conversion.recipe.tasks())
    write = convert_module.write_file

    def slow_write(file: Path, pieces: list) -> None:
        os.write(begun, f"{sum(piece.nbytes for piece in pieces)}\n".encode())
        write(file, [piece[: piece.nbytes // 2] for piece in pieces])
        time.sleep(random.random() * 0.01)  # half of it is there
        write(file, pieces)

    convert_module.write_file = slow_write
    killed = 0
    for attempt in range(kills):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            convert(source, target, workers=2)
            os._exit(0)
        # evenly over the conversion, in the middle of whatever is done then
        goal = total * (attempt + random.random()) / (kills + 1)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if os.fstat(begun).st_size and _written(target.with_name("begun")) >= goal:
                time.sleep(random.random() * 0.01)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                assert not target.exists()
                killed += 1
                break
            time.sleep(0.002)
    report = convert(source, target, workers=2)
    assert report.whole and report.found_bytes > 0
    print(json.dumps({"begun": _written(target.with_name("begun")), "total": total, "killed": killed}))


def _written(log: Path) -> int:
    return sum(map(int, log.read_text().split()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of every fork
    chunk_grid.CHUNK_BYTES = int(sys.argv[4])
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
