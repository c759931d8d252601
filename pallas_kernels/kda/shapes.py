"""Argument shapes of kda and kda_step that tests and benchmarks share."""

from typing import NamedTuple


class KdaShape(NamedTuple):
    """Arguments q, k, g [B, T, H, Dk] and v [B, T, H, Dv]."""

    name: str
    B: int
    T: int
    H: int
    Dk: int
    Dv: int


class KdaStepShape(NamedTuple):
    """Arguments q, k, g [B, H, Dk], v [B, H, Dv] and a state [B, H, Dk, Dv]."""

    B: int
    H: int
    Dk: int
    Dv: int


KIMI = (KdaShape("Kimi Linear, two of its heads, 300 tokens", 1, 300, 2, 128, 128),)
PROMPT = KdaShape("Kimi Linear, a prompt", 1, 4096, 32, 128, 128)
AWKWARD = (
    KdaShape("one token", 2, 1, 1, 8, 4),
    KdaShape("a chunk less one", 1, 63, 2, 16, 24),
    KdaShape("a chunk", 1, 64, 2, 16, 24),
    KdaShape("a chunk and one", 2, 65, 2, 16, 24),
    KdaShape("three chunks and a bit", 1, 200, 2, 16, 24),
)
STEP = (
    KdaStepShape(1, 16, 128, 128),  # one sequence, half of Kimi Linear's heads
    KdaStepShape(12, 3, 128, 128),  # a block of sequences and a half
    KdaStepShape(5, 1, 128, 256),
)
