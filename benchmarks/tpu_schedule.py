"""Compiles the Pallas kernels for TPUs that are not here and prints what the compiler's schedule says.

    python benchmarks/tpu_schedule.py                      # every case, every chip
    python benchmarks/tpu_schedule.py --chip v6e --case kda --loops
    python benchmarks/tpu_schedule.py --budget             # the recorded cases against their budget
    python benchmarks/tpu_schedule.py --chip v6e --case kda --record

Nothing runs on a TPU: a schedule knows no DMA waits and no stalls, so its time is a lower bound (compiled, not run).
Exits with 1 if a case does not compile or is beyond its budget. Needs libtpu (`pip install -e .[test]` on Linux).
"""

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import tpu.cases  # noqa: E402
from tpu import budget  # noqa: E402
from tpu.case import Case, Row, measure  # noqa: E402

from pallas_kernels.hardware import CHIPS  # noqa: E402

HEAD = (
    f"{'case':44} {'chip':6} {'bundles/unit':>12} {'schedule':>10} {'HBM':>10} {'MXU':>10} {'GB/s':>6} {'x roof':>6} "
    f"{'spills':>6}  unit"
)


def cases() -> list[Case]:
    """Those of every module in tpu/cases."""
    modules = sorted(module.name for module in pkgutil.iter_modules(tpu.cases.__path__))
    return [case for name in modules for case in importlib.import_module(f"tpu.cases.{name}").CASES]


def main() -> int:
    """Compiles and prints; returns the exit code."""
    options = _options()
    limits = {} if options.budget is None else budget.read(options.budget)
    rows, complaints = [], []
    print(HEAD)
    for case in cases():
        for chip in options.chip or CHIPS:
            if not (any(part in case.name for part in options.case) if options.case else True):
                continue
            if options.budget is not None and (case.name, chip) not in limits:
                continue
            try:
                row = measure(case, chip)
            except Exception as error:  # the compiler's own words, and on with the next
                complaints.append(f"{case.name} on {chip}: {type(error).__name__}: {str(error)[:600]}")
                print(complaints[-1], flush=True)
                continue
            rows.append(row)
            _print(case, row, options.loops)
            if (over := budget.excess(row, limits.pop((case.name, chip), {}))) is not None:
                complaints.append(over)
    complaints += [f"{case} on {chip}: in the budget, but there is no such case" for case, chip in limits]
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if options.record:
        budget.write(budget.budget_path(), rows)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=sorted(CHIPS), help="repeatable; default all")
    parser.add_argument("--case", action="append", help="part of a case's name; repeatable; default all")
    parser.add_argument("--loops", action="store_true", help="also every loop, and what XLA runs beside the kernel")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--budget", type=Path, nargs="?", const=budget.budget_path(), help="hold the cases that this file lists to it"
    )
    parser.add_argument("--record", action="store_true", help="write the numbers into this libtpu's budget")
    return parser.parse_args()


def _print(case: Case, row: Row, loops: bool) -> None:
    microseconds = (1e6 * seconds for seconds in (row.seconds, row.hbm_seconds, row.mxu_seconds))
    times = " ".join(f"{time:8.1f}us" for time in microseconds)
    rate = case.hbm_bytes / row.seconds / 1e9
    print(
        f"{row.case:44} {row.chip:6} {row.bundles_per_unit:12.1f} {times} {rate:6.0f} {row.ratio:6.2f} {row.spills:6}"
        f"  {case.unit}",
        flush=True,
    )
    for line in row.glue if loops else ():
        print(f"    beside the kernel: {line}")
    for loop in row.loops if loops else ():
        used = ", ".join(f"{unit} {share:.0%}" for unit, share in loop.use.items() if share > 0.02)
        print(f"    depth {loop.depth}: {loop.bundles} bundles, {loop.spills} spills; {used}")


if __name__ == "__main__":
    sys.exit(main())
