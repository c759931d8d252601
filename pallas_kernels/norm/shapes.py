"""Argument shapes of `add_norm` that tests and benchmarks share."""

from typing import NamedTuple


class AddNormShape(NamedTuple):
    """Arguments for T rows of D numbers, of which block number `block` of `rows` each is normed."""

    name: str
    T: int
    D: int
    rows: int
    block: int


KIMI = (
    AddNormShape("K2.5, all rows", 64, 7168, 64, 0),
    AddNormShape("K2.5, a device's rows", 64, 7168, 8, 3),
)
AWKWARD = (
    AddNormShape("one row", 1, 128, 1, 0),
    AddNormShape("an odd number of rows", 37, 1280, 37, 0),
    AddNormShape("as many rows as there may be, the last of them", 128, 384, 24, 4),
)
