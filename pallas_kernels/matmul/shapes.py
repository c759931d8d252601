"""Argument shapes of `matmul` that tests and benchmarks share."""

from typing import NamedTuple


class MatmulShape(NamedTuple):
    """Arguments x [M, K] and a weight of K inputs and N outputs."""

    name: str
    M: int
    K: int
    N: int


KIMI = (
    MatmulShape("K2 gate or up, 8 tokens", 8, 7168, 2048),
    MatmulShape("K2 down, 16 tokens", 16, 2048, 7168),
)
AWKWARD = (
    MatmulShape("one group, one output", 1, 32, 1),
    MatmulShape("nothing to do", 0, 64, 8),
    MatmulShape("odd everything", 7, 96, 33),
    MatmulShape("many rows", 130, 160, 100),
)
