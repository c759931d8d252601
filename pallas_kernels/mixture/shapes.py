"""Argument shapes of a mixture that tests and benchmarks share."""

from typing import NamedTuple


class MixtureShape(NamedTuple):
    """Arguments x [T, K], J of `experts` experts for each token, and matrices of `num_local` experts, N wide.

    The local experts are those from number `first` on.
    """

    name: str
    T: int
    J: int
    K: int
    N: int
    experts: int
    first: int
    num_local: int


KIMI = (MixtureShape("Kimi Linear, 2 of 256 experts here", 8, 8, 2304, 1024, 256, 4, 2),)  # not INT4
AWKWARD = (
    MixtureShape("one token, all of whose experts are here", 1, 2, 128, 128, 2, 0, 2),
    MixtureShape("one token, none of whose experts are here", 1, 1, 128, 128, 64, 60, 2),
    MixtureShape("an expert with more rows than a window", 23, 2, 256, 128, 3, 0, 3),
    MixtureShape("an odd number of tokens, experts elsewhere before and after", 37, 3, 256, 384, 12, 4, 5),
    MixtureShape("more rows of an expert than a visit takes", 290, 1, 128, 256, 2, 0, 2),
)
