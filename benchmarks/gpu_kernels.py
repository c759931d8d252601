"""Compiles the kernels for a GPU that this machine does not have, and holds them to their budget.

    python benchmarks/gpu_kernels.py                  # registers, spills and shared memory of every kernel
    python benchmarks/gpu_kernels.py --budget         # exit code 1 where one takes more than is recorded
    python benchmarks/gpu_kernels.py --record         # write the numbers down for this version of JAX

Compiled, not run. Needs the extra `gpu-compile`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

# Before JAX is imported, which would look for a driver otherwise
os.environ["JAX_PLATFORMS"] = "cpu"

from kimi_jax.plan import gpu_target  # noqa: E402

DUMP = Path(tempfile.mkdtemp(prefix="gpu-kernels-"))
try:
    os.environ |= gpu_target.environment()
except ValueError as error:
    sys.exit(f"{Path(__file__).name}: {error}")
os.environ["XLA_FLAGS"] += f" --xla_dump_to={DUMP}"

import jax  # noqa: E402
from cuda.cases import CASES  # noqa: E402
from cuda.kernels import Kernel, compile_case  # noqa: E402

from pallas_kernels.hardware import GPUS  # noqa: E402
from sharding.topologies import topology  # noqa: E402

BUDGETS = Path(__file__).parent / "cuda" / "budgets"


def excess(found: Kernel, allowed: dict[str, int]) -> list[str]:
    """Lists the numbers of a kernel above its budget."""
    listed = {"registers": found.registers, "shared": found.shared, "spills": found.spills}
    return [f"{name} {value:,}, budget {limit:,}" for name, value in listed.items() if value > (limit := allowed[name])]


def main(arguments: list[str]) -> int:
    """Compiles and prints the cases that the flags choose; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described = [name for name, gpu in GPUS.items() if gpu.facts is not None]
    parser.add_argument("--chip", default="h100", choices=described, help="a GPU of pallas_kernels.hardware")
    parser.add_argument("--case", action="append", help="part of a case's name; repeatable; default all")
    parser.add_argument("--budget", action="store_true", help="hold the kernels to what is recorded")
    parser.add_argument("--record", action="store_true", help="record the numbers")
    options = parser.parse_args(arguments)
    path = BUDGETS / f"{options.chip}-jax-{jax.__version__}.json"
    limits = json.loads(path.read_text()) if path.exists() else {}
    (device,) = gpu_target.devices(topology(f"{options.chip}:1"))
    complaints = []
    for case in CASES:
        if options.case and not any(part in case.name for part in options.case):
            continue
        shutil.rmtree(DUMP, ignore_errors=True)
        DUMP.mkdir()
        kernels = compile_case(case, device, DUMP)
        for name, kernel in sorted(kernels.items()):
            words = f"{kernel.registers} registers, {kernel.spills} bytes spilled, {kernel.shared:,} shared"
            print(f"{case.name}: {name}: {words}", flush=True)
            if options.budget:
                above = excess(
                    kernel, limits.get(case.name, {}).get(name) or {"registers": 0, "shared": 0, "spills": 0}
                )
                complaints += [f"{case.name}: {name}: {'; '.join(above)}"] if above else []
        if options.record:
            limits[case.name] = {name: vars(kernel) for name, kernel in sorted(kernels.items())}
    shutil.rmtree(DUMP, ignore_errors=True)
    if options.record:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(limits, indent=1) + "\n")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
