"""Argument shapes of int4_matmul that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """x [M, K] times a weight of K inputs and N outputs."""

    name: str
    M: int
    K: int
    N: int


KIMI = (
    Shape("K2 gate or up, 8 tokens", 8, 7168, 2048),
    Shape("K2 down, 16 tokens", 16, 2048, 7168),
)
AWKWARD = (
    Shape("one group, one output", 1, 32, 1),
    Shape("nothing to do", 0, 64, 8),
    Shape("odd everything", 7, 96, 33),
    Shape("many rows", 130, 160, 100),
)
