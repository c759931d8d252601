"""Runs `kimi-jax` as one of several processes, with the command line that follows, for test_processes.py. At its end it
writes to standard error how many bytes of safetensors it read."""

import sys

from checkpoints.published.safetensors import Published
from kimi_jax import cli

read_bytes = 0
read = Published.read


def counted(*arguments):
    global read_bytes
    values = read(*arguments)
    read_bytes += values.nbytes
    return values


Published.read = counted
code = cli.main(sys.argv[1:])
print(f"read {read_bytes} bytes", file=sys.stderr)
sys.exit(code)
