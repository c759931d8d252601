"""Runs `kimi-jax` as one of several processes, with the command line that follows, for test_processes.py. At its end it
writes to standard error how many bytes of safetensors it read. What native code writes to standard output is dropped:
XLA's collectives on CPUs log there when they connect, several threads at once, in the midst of each other's lines."""

import os
import sys

sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

from checkpoints.stored import source  # noqa: E402 (after standard output is set aside)
from kimi_jax import cli  # noqa: E402

read_bytes = 0
read_into = source.read_into


def counting(file, offset, into):
    global read_bytes
    read_bytes += len(into)
    return read_into(file, offset, into)


source.read_into = counting
code = cli.main(sys.argv[1:])
sys.stdout.flush()
print(f"read {read_bytes} bytes", file=sys.stderr)
sys.exit(code)
