"""Argument shapes of the projections that tests and benchmarks share."""

from typing import NamedTuple


class ProjectionShape(NamedTuple):
    """Arguments for B tokens of C channels, H heads of N + R channels (N of a value), a latent of L, hidden vectors of
    D.

    `norms` and `rotates` say whether queries have a norm before them and RoPE, `gates` whether values have a gate.
    """

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
    gates: bool = False


KIMI = (
    ProjectionShape("K2, two heads", 4, 1536, 512, 128, 64, 2, 1024),
    ProjectionShape("Kimi Linear, four heads", 3, 2304, 512, 128, 64, 4, 2304, norms=False, rotates=False),
)
AWKWARD = (
    ProjectionShape("one token, one head", 1, 128, 128, 128, 64, 1, 128),
    ProjectionShape("an odd number of tokens, two blocks of heads", 37, 256, 128, 128, 32, 16, 384),
    ProjectionShape("as many tokens as there may be", 128, 128, 256, 128, 2, 8, 128, norms=False),
    ProjectionShape("a norm without RoPE, and a gate", 5, 128, 128, 256, 64, 2, 256, rotates=False, gates=True),
)
