"""Argument shapes of the grouped ops, dense and INT4, that tests and benchmarks share."""

from typing import NamedTuple


class GroupedShape(NamedTuple):
    """Arguments x [sum of sizes + spare, K] and len(sizes) matrices from K inputs to N; K is a multiple of 32."""

    name: str
    K: int
    N: int
    sizes: tuple[int, ...]
    spare: int = 0


KIMI = (GroupedShape("Kimi Linear down, 6 rows for 2 of 3 experts", 1024, 2304, (2, 0, 4)),)
AWKWARD = (
    GroupedShape("no rows at all", 32, 8, (0, 0)),
    GroupedShape("rows, but no group takes any", 32, 8, (0, 0, 0), spare=20),
    GroupedShape("one row", 32, 8, (0, 1, 0)),
    GroupedShape("empty first and last", 64, 33, (0, 5, 0, 7, 0)),
    GroupedShape("one group takes all", 96, 20, (0, 150, 0)),
    GroupedShape("a block runs over the last row", 32, 24, (61, 3, 65, 1, 10)),
    GroupedShape("rows past the last group", 64, 16, (17, 0, 40), spare=9),
    GroupedShape("sixteen rows", 32, 8, (3, 9, 0, 4)),
    GroupedShape("seventeen rows", 32, 8, (3, 9, 1, 4)),
)
