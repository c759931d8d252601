"""TPU chips as the compiler and the roofline see them, per TensorCore.

Clocks are not published for all of them: v5e's follows from its 197 TFLOP/s, the others are assumed (+-30 % between
chips; ratios on one chip are free of them).
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One TensorCore: clock in Hz, HBM in bytes/s, bf16 matrix products in FLOP/s."""

    name: str
    topology: str
    clock: float
    hbm: float
    bf16: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", 1.5e9, 819e9, 197e12),
        Chip("v5p", "v5p:2x2x1", 1.75e9, 1382e9, 229.5e12),
        Chip("v6e", "v6e:2x2", 1.75e9, 1640e9, 918e12),
        Chip("tpu7x", "tpu7x:2x2x1", 2.2e9, 3690e9, 1153.5e12),
    )
}
