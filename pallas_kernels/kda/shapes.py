"""Argument shapes of kda that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """q, k, g [B, T, H, Dk] and v [B, T, H, Dv]."""

    name: str
    B: int
    T: int
    H: int
    Dk: int
    Dv: int


KIMI = (Shape("Kimi Linear, two of its heads, 300 tokens", 1, 300, 2, 128, 128),)
AWKWARD = (
    Shape("one token", 2, 1, 1, 8, 4),
    Shape("a chunk less one", 1, 63, 2, 16, 24),
    Shape("a chunk", 1, 64, 2, 16, 24),
    Shape("a chunk and one", 2, 65, 2, 16, 24),
    Shape("three chunks and a bit", 1, 200, 2, 16, 24),
)
