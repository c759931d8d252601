"""`kimi-jax` as one of several processes: what follows is its command line. Ends by writing to standard error how many
bytes of safetensors it read. Run by test_processes.py."""

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
