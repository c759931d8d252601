"""Starts commands of `kimi-jax` that form one job, each with four devices."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path


@contextlib.contextmanager
def started(*commands):
    """Starts a process for each command line, as the processes 0, 1, ... of one job, and ends them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    job = ["--distributed", "--coordinator", coordinator, "--num-processes", str(len(commands))]
    script = Path(__file__).parent / "one_of_several.py"
    running = [
        subprocess.Popen(
            [sys.executable, script, *command, *job, "--process-id", str(i)],
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, command in enumerate(commands)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def run_job(*commands):
    """Runs a job, and returns (exit code, standard output, error) of each process."""
    with started(*commands) as running:
        ended = [(process.communicate(timeout=900), process.returncode) for process in running]
    return [(code, out, err) for (out, err), code in ended]
