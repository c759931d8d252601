"""Reads libtpu's dump of one kernel: its loops, the VLIW bundles of each, and how full they are.

`*-final_bundles.txt` has a bundle per line, `0x1a LB: >> { ... }`, with a `>` for each loop around the bundle; LB marks
the first bundle of a loop. `*-final_hlo-static-per-bundle-utilization.txt` has a row per bundle and a column per unit.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+((?:[A-Z]{2}\s*)*):\s*((?:>\s*)*)\{")


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel, or (at depth 0) the kernel outside its loops.

    `bundles` counts those at this depth, without inner loops; `use` is issued operations over slots, by unit;
    `spills` counts stores to and loads from spilled registers.
    """

    depth: int
    bundles: int
    use: dict[str, float]
    spills: int


def read_kernel(folder: Path, kernel: str) -> list[Loop]:
    """Returns the kernel's loops in program order (a loop before its inner ones), depth 0 first.

    Raises FileNotFoundError where the dump has no such kernel, or more than one.
    """
    bundles = _only(folder, kernel, "final_bundles.txt", "schedule-analysis")
    use = _only(folder, kernel, "final_hlo-static-per-bundle-utilization.txt")
    lines = use.read_text().splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    slots = [int(word) for word in lines[2].split()]
    rows = [[int(word) for word in line.split()] for line in lines[4:] if line.strip()]

    members: list[list[int]] = [[]]
    depths, open_loops, latest = [0], [0], {0: 0}
    for line in bundles.read_text().splitlines():
        if (match := _BUNDLE.match(line)) is None:
            continue
        address, labels, depth = int(match[1], 16), match[2].split(), match[3].count(">")
        if line[match.end() - 1 :].startswith("{}"):  # an empty bundle is printed without its depth
            depth = len(open_loops) - 1
        del open_loops[depth + 1 :]
        if "LB" in labels:
            del open_loops[depth:]
            latest[depth] = len(members)
            members.append([])
            depths.append(depth)
        # Some bundles at a loop's end are printed one loop further out; later bundles continue that loop.
        open_loops += [latest[inner] for inner in range(len(open_loops), depth + 1)]
        members[open_loops[-1]].append(address)
    return [
        _loop(depth, [rows[i] for i in at if i < len(rows)], units, slots)
        for depth, at in zip(depths, members, strict=True)
    ]


def _loop(depth: int, rows: list[list[int]], units: list[str], slots: list[int]) -> Loop:
    totals = [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * len(units)
    use = {unit: total / (slot * max(1, len(rows))) for unit, total, slot in zip(units, totals, slots, strict=True)}
    spilled = sum(total for unit, total in zip(units, totals, strict=True) if unit.endswith((":SPILL", ":FILL")))
    return Loop(depth, len(rows), use, spilled)


def _only(folder: Path, kernel: str, ending: str, excluded: str = "\0") -> Path:
    found = [
        path
        for path in folder.iterdir()
        if re.search(rf"-{re.escape(kernel)}(\.\d+)?-\d+-{re.escape(ending)}$", path.name) and excluded not in path.name
    ]
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: {len(found)} files of kernel {kernel!r} end in {ending}, expected one")
    return found[0]
