"""Reads and writes the budget of the compiled kernels by case and chip: bundles per unit, spills, and how many
operations run beside the kernel.

A schedule is deterministic, so a test can compare it with a budget. Each version of libtpu schedules otherwise and has
a budget file of its own.
"""

import json
from importlib.metadata import version
from pathlib import Path

from tpu.case import Row

SLACK = 1.03  # room for small changes of a kernel; the same libtpu and kernel give the same number


def budget_path() -> Path:
    """Returns the budget file of the installed libtpu."""
    return Path(__file__).parent / "budgets" / f"libtpu-{version('libtpu')}.json"


def read(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Returns {(case, chip): {"bundles_per_unit": ..., "spills": ..., "beside": ...}}."""
    listed = json.loads(path.read_text())
    return {(case, chip): limit for case, chips in listed.items() for chip, limit in chips.items()}


def write(path: Path, rows: list[Row]) -> None:
    """Writes the rows into the file, in place of its limits for their cases and chips."""
    limits = read(path) if path.exists() else {}
    for row in rows:
        limits[row.case, row.chip] = _found(row) | {"bundles_per_unit": round(row.bundles_per_unit, 2)}
    listed: dict[str, dict[str, dict[str, float]]] = {}
    for (case, chip), limit in sorted(limits.items()):
        listed.setdefault(case, {})[chip] = limit
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(listed, indent=1) + "\n")


def excess(row: Row, limit: dict[str, float]) -> str | None:
    """Returns a line that names the numbers of the row more than 3 % above its budget, None where there are none."""
    found = _found(row)
    excesses = [
        f"{name} {found[name]:.2f}, budget {allowed}"
        for name, allowed in limit.items()
        if found[name] > SLACK * allowed
    ]
    return f"{row.case} on {row.chip}: {'; '.join(excesses)}" if excesses else None


def _found(row: Row) -> dict[str, float]:
    return {"bundles_per_unit": row.bundles_per_unit, "spills": row.spills, "beside": len(row.glue)}
