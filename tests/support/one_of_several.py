"""Runs `kimi-jax` as one of several processes, with the command line that follows, for test_processes.py. At its end it
writes to standard error how many bytes of safetensors it read."""

import sys

from checkpoints.stored import source
from kimi_jax import cli

read_bytes = 0
read_into = source.read_into


def counting(file, offset, into):
    global read_bytes
    read_bytes += len(into)
    return read_into(file, offset, into)


source.read_into = counting
code = cli.main(sys.argv[1:])
print(f"read {read_bytes} bytes", file=sys.stderr)
sys.exit(code)
