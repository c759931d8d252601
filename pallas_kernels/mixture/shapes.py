"""Argument shapes of a mixture that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """x [T, K], of whose `experts` each token has J and `held` from number `first` on are here, N wide."""

    name: str
    T: int
    J: int
    K: int
    N: int
    experts: int
    first: int
    held: int


KIMI = (Shape("Kimi Linear, 2 of 256 experts here", 8, 8, 2304, 1024, 256, 4, 2),)  # not INT4
AWKWARD = (
    Shape("one token, all of whose experts are here", 1, 2, 128, 128, 2, 0, 2),
    Shape("one token, none of whose experts are here", 1, 1, 128, 128, 64, 60, 2),
    Shape("an expert with more rows than a window", 23, 2, 256, 128, 3, 0, 3),
    Shape("an odd number of tokens, experts elsewhere before and after", 37, 3, 256, 384, 12, 4, 5),
    Shape("more rows of an expert than a visit takes", 290, 1, 128, 256, 2, 0, 2),
)
