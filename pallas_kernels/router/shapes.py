"""Argument shapes of a router that tests and benchmarks share."""

from typing import NamedTuple


class RouterShape(NamedTuple):
    """Arguments for T tokens of D channels, of which each chooses J of E experts."""

    name: str
    T: int
    D: int
    E: int
    J: int


KIMI = (
    RouterShape("K2.5", 64, 7168, 384, 8),
    RouterShape("Kimi Linear", 4, 2304, 256, 8),
    RouterShape("K3", 64, 7168, 896, 16),
)
AWKWARD = (
    RouterShape("one token", 1, 256, 128, 2),
    RouterShape("fewer experts than a block, choices that fill no register", 5, 128, 64, 6),
    RouterShape("three blocks of 16 experts", 8, 128, 48, 3),
    RouterShape("an odd number of tokens, and as many choices as experts", 37, 128, 128, 128),
    RouterShape("as many tokens as there may be, one choice", 128, 128, 384, 1),
)
