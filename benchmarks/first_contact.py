"""Measures what a person waits for before any model is loaded: CPU seconds of refusals, help, and a preset's sizes.

    python benchmarks/first_contact.py

Each command runs in a process of its own; the least of three runs counts. Ends with 1 where one takes longer than its
limit.
"""

import os
import subprocess
import sys
import tempfile

RUNS = 3
REFUSAL_S, INSPECT_S = 0.5, 2.0
REFUSALS = (
    ["generate", "gone", "--prompt", "Hello"],
    ["generate", "gone", "--prompts", "gone.jsonl"],
    ["chat", "gone"],
    ["agent", "gone", "--prompt", "Hello"],
    ["serve", "gone"],
    ["convert", "gone", "new"],
    ["inspect", "gone"],
    ["verify", "gone"],
    ["export", "gone", "new"],
    ["train", "gone", "--data", "gone.jsonl", "--out", "new"],
    ["demo", "--image", "gone.png"],
    ["inspect", "--preset", "kimi-k9"],
    ["plan", "--model", "kimi-k9"],
    ["generat"],
)


def cpu_seconds(arguments: list[str], folder: str, expected: tuple[int, ...]) -> float:
    """Returns user and system seconds of a command in `folder`. Raises RuntimeError for another exit code than one of
    those expected."""
    before = os.times()
    command = [sys.executable, "-m", "kimi_jax.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode not in expected:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}, {done.stderr.strip()}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    """Prints a line for each command, and returns the exit code."""
    jobs = [(arguments, REFUSAL_S, (1, 2)) for arguments in REFUSALS]
    jobs += [(["--help"], REFUSAL_S, (0,)), (["inspect", "--preset", "kimi-k2.5"], INSPECT_S, (0,))]
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        for arguments, limit, expected in jobs:
            seconds = min(cpu_seconds(arguments, folder, expected) for _ in range(RUNS))
            slow += seconds > limit
            print(f"{seconds:5.2f} s (at most {limit}): kimi-jax {' '.join(arguments)}", flush=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
