"""Argument shapes of mla_prefill and mla_decode that tests and benchmarks share."""

from typing import NamedTuple


class PrefillShape(NamedTuple):
    """Arguments q [B, S, H, D], k [B, T, H, D] and v [B, T, H, Dv]."""

    name: str
    B: int
    S: int
    T: int
    H: int
    D: int
    Dv: int


class DecodeShape(NamedTuple):
    """Arguments for queries of H heads and a cache [pages, latent + rope, page], with one length for each sequence."""

    name: str
    H: int
    latent: int
    rope: int
    page: int
    lengths: tuple[int, ...]


PREFILL = (
    PrefillShape("K2, two of its heads", 1, 300, 300, 2, 192, 128),
    PrefillShape("one query, one key", 1, 1, 1, 1, 8, 8),
    PrefillShape("a later part of a prompt", 2, 37, 301, 3, 24, 16),
)
DECODE = (
    DecodeShape("K2, four of its heads", 4, 512, 64, 128, (700, 128, 1)),
    DecodeShape("an empty sequence between others", 3, 16, 8, 4, (13, 0, 4, 1)),
)
