"""Exports `argv[1]` to `argv[2]` in shards of `argv[4]` bytes, killed by SIGKILL or SIGTERM `argv[3]` times at random
moments and begun anew; a process of its own, since it forks. Prints a JSON line: attempts killed, bytes written by all
attempts, and bytes of the tensors."""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from checkpoints import export
from checkpoints.published import shards


def main(source: Path, target: Path, kills: int, shard_bytes: int) -> None:
    random.seed(0)
    log = target.with_name("begun")
    begun = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    write = shards.ShardWriter.write

    def slow_write(self: shards.ShardWriter, name: str, block: Any, row: int = 0) -> None:
        if name not in self.finished:
            os.write(begun, f"{block.nbytes}\n".encode())
            time.sleep(random.random() * 0.004)
        write(self, name, block, row)

    shards.ShardWriter.write = slow_write
    killed = 0
    total = sum(file.stat().st_size for file in source.glob("*/c*"))
    for _ in range(kills):
        sys.stdout.flush()
        before, child = _written(log), os.fork()
        if child == 0:
            export(source, target, shard_bytes=shard_bytes, workers=2)
            os._exit(0)
        # some shards later from one attempt to the next
        goal = before + total * random.random() / kills
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if _written(log) > goal:
                time.sleep(random.random() * 0.01)
                os.kill(child, random.choice([signal.SIGKILL, signal.SIGTERM]))
                os.waitpid(child, 0)
                killed += 1
                break
            time.sleep(0.001)
        else:
            break
    report = export(source, target, shard_bytes=shard_bytes, workers=2)
    print(json.dumps({"killed": killed, "begun": _written(log), "nbytes": report.nbytes}))


def _written(log: Path) -> int:
    return sum(map(int, log.read_text().split()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of every fork
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
