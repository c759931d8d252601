"""Argument shapes of mla_prefill and mla_decode that tests and benchmarks share."""

from typing import NamedTuple


class Prefill(NamedTuple):
    """q [B, S, H, D], k [B, T, H, D], v [B, T, H, Dv]."""

    name: str
    B: int
    S: int
    T: int
    H: int
    D: int
    Dv: int


class Decode(NamedTuple):
    """Queries of H heads over a cache [pages, latent + rope, page]; one length per sequence."""

    name: str
    H: int
    latent: int
    rope: int
    page: int
    lengths: tuple[int, ...]


PREFILL = (
    Prefill("K2, two of its heads", 1, 300, 300, 2, 192, 128),
    Prefill("one query, one key", 1, 1, 1, 1, 8, 8),
    Prefill("a later part of a prompt", 2, 37, 301, 3, 24, 16),
)
DECODE = (
    Decode("K2, four of its heads", 4, 512, 64, 128, (700, 128, 1)),
    Decode("an empty sequence between others", 3, 16, 8, 4, (13, 0, 4, 1)),
)
