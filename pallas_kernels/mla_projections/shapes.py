"""Argument shapes of the projections that tests and benchmarks share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """B tokens out of C channels, H heads of N + R channels and of N of a value, a latent of L, hidden vectors of D;
    with a norm before the queries and with RoPE, or without."""

    name: str
    B: int
    C: int
    L: int
    N: int
    R: int
    H: int
    D: int
    norms: bool = True
    rotates: bool = True


KIMI = (
    Shape("K2, two heads", 4, 1536, 512, 128, 64, 2, 1024),
    Shape("Kimi Linear, four heads", 3, 2304, 512, 128, 64, 4, 2304, norms=False, rotates=False),
)
AWKWARD = (
    Shape("one token, one head", 1, 128, 128, 128, 64, 1, 128),
    Shape("an odd number of tokens, two blocks of heads", 37, 256, 128, 128, 32, 16, 384),
    Shape("as many tokens as there may be", 128, 128, 256, 128, 2, 8, 128, norms=False),
    Shape("a norm without RoPE", 5, 128, 128, 256, 64, 2, 256, rotates=False),
)
