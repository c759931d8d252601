"""Argument shapes of the grouped ops, dense and INT4, that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """x [sum of sizes + spare, K] times one of len(sizes) matrices that take K to N; K is a multiple of 32."""

    name: str
    K: int
    N: int
    sizes: tuple[int, ...]
    spare: int = 0


KIMI = (Shape("Kimi Linear down, 6 rows for 2 of 3 experts", 1024, 2304, (2, 0, 4)),)
AWKWARD = (
    Shape("no rows at all", 32, 8, (0, 0)),
    Shape("rows, but no group takes any", 32, 8, (0, 0, 0), spare=20),
    Shape("one row", 32, 8, (0, 1, 0)),
    Shape("empty first and last", 64, 33, (0, 5, 0, 7, 0)),
    Shape("one group takes all", 96, 20, (0, 150, 0)),
    Shape("a block runs over the last row", 32, 24, (61, 3, 65, 1, 10)),
    Shape("rows past the last group", 64, 16, (17, 0, 40), spare=9),
    Shape("sixteen rows", 32, 8, (3, 9, 0, 4)),
    Shape("seventeen rows", 32, 8, (3, 9, 1, 4)),
)
