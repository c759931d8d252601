"""`kimi-jax` as one of several processes: what follows is its command line. Ends by writing to standard error how many
bytes of safetensors it read. Run by test_processes.py."""

import sys

from checkpoints.safetensors import Published
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
