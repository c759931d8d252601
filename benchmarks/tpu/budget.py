"""What the compiled kernels may cost: bundles per unit and spills by chip and case, one file per libtpu version.

A schedule is deterministic, so a test may hold it; another libtpu schedules otherwise, hence the version in the name.
"""

import json
from importlib.metadata import version
from pathlib import Path

from tpu.case import Row

SLACK = 1.03


def budget_path() -> Path:
    """The file of the libtpu that is installed."""
    return Path(__file__).parent / "budgets" / f"libtpu-{version('libtpu')}.json"


def read(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """{(case, chip): {"bundles_per_unit": ..., "spills": ...}}."""
    listed = json.loads(path.read_text())
    return {(case, chip): limit for case, chips in listed.items() for chip, limit in chips.items()}


def write(path: Path, rows: list[Row]) -> None:
    """Records the rows, in place of what the file says of the same cases and chips."""
    limits = read(path) if path.exists() else {}
    for row in rows:
        limits[row.case, row.chip] = {"bundles_per_unit": round(row.bundles_per_unit, 2), "spills": row.spills}
    listed: dict[str, dict[str, dict[str, float]]] = {}
    for (case, chip), limit in sorted(limits.items()):
        listed.setdefault(case, {})[chip] = limit
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(listed, indent=1) + "\n")


def excess(row: Row, limit: dict[str, float]) -> str | None:
    """What of the row is more than 3 % beyond its budget, in words."""
    found = {"bundles_per_unit": row.bundles_per_unit, "spills": row.spills}
    over = [
        f"{name} {found[name]:.2f}, budget {allowed}"
        for name, allowed in limit.items()
        if found[name] > SLACK * allowed
    ]
    return f"{row.case} on {row.chip}: {'; '.join(over)}" if over else None
