"""Measures the first token where an earlier process has compiled the programs: `kimi-jax generate` of the toys.

    python benchmarks/first_token.py [--rounds 3]

The toys are those of `cpu_vs_transformers.py`, 48M parameters each; processes of a family run one after another with
one cache of compiled programs. Seconds are those that the command prints, from the loaded model to the first token: of
the first process, which compiles, and the least of the others. Ends with 1 where that is more than `LIMIT_S`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cpu_vs_transformers import FAMILIES

from checkpoints.toy import write_toy

LIMIT_S = 3.0
FIRST = re.compile(r"the first after ([\d.]+) s")


def first_token(model: Path, cache: Path) -> float:
    """Returns the seconds that a process of its own needs for the first of two tokens."""
    command = [sys.executable, "-m", "kimi_jax.cli", "generate", str(model), "--prompt", "Count.", "--max-new-tokens=2"]
    # With this variable every process would compile Python's sources, too
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["XDG_CACHE_HOME"] = str(cache)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = FIRST.search(done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}, {done.stderr.strip()[-500:]}")
    return float(found[1])


def main() -> int:
    """Prints a line for each family, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes after the one that compiles")
    rounds = parser.parse_args().rounds
    slow = 0
    with tempfile.TemporaryDirectory() as folder:
        for family, config in FAMILIES.items():
            model = write_toy(Path(folder) / family.replace(" ", "-").lower(), config)
            first, *later = (first_token(model, Path(folder) / "cache") for _ in range(1 + rounds))
            slow += min(later) > LIMIT_S
            print(f"{family}: {first:.1f} s, then {min(later):.1f} s (at most {LIMIT_S:.0f})", flush=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
