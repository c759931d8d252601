"""The table of plans, a line for each slice, from the records that `kimi-jax plan --json` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_jax.plan.job import words
from sharding import AXES

WIDTH = 80
_LEFT = frozenset({"slice", "mesh", "from"})


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table's lines, at most `WIDTH` characters each but for reasons that are longer.

    A mesh that is too long there is written by its numbers alone, which `--mesh` takes as well.
    """
    table = _table(records, words)
    if max(map(len, table)) > WIDTH:
        table = _table(records, lambda mesh: "x".join(str(mesh[axis]) for axis in AXES))
    names = max(len(record["topology"]) for record in records)
    refused = [f"{record['topology']:<{names}}  {record['short']}" for record in records if "error" in record]
    return [*table, *refused]


def _table(records: Sequence[Mapping[str, Any]], spell: Any) -> list[str]:
    rows = [_cells(record, spell) for record in records if "error" not in record]
    if not rows:
        return [""]
    heads = list(rows[0])
    names = max(len(record["topology"]) for record in records)
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in heads}
    widths["slice"] = max(widths["slice"], names)
    gap = "  " if sum(widths.values()) + 2 * (len(heads) - 1) <= WIDTH else " "
    return [
        gap.join(f"{row[head]:{'<' if head in _LEFT else '>'}{widths[head]}}" for head in heads).rstrip()
        for row in [{head: head for head in heads}, *rows]
    ]


def _cells(record: Mapping[str, Any], spell: Any) -> dict[str, str]:
    cells = {
        "slice": record["topology"],
        "mesh": spell(record["mesh"]),
        "chips": f"{record['chips']}",
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
    }
    if "cost" in record:
        cells["$/M"] = f"{record['cost']['per_million_tokens']:,.2f}"
    return cells | {"bound": record["step"]["bound_by"], "from": record["from"]}


def cost(record: Mapping[str, Any], price: float) -> dict[str, float]:
    """Returns the least cost of a million tokens in dollars, at `price` for each chip and hour."""
    seconds = 1e6 / record["tokens_per_second"]
    return {"per_chip_hour": price, "per_million_tokens": price * record["chips"] * seconds / 3600}
