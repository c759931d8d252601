"""TPU chips and slices: what the compiler, the roofline and the planner know of them. One table.

A JAX device is a chip, save on tpu7x, where it is one of a chip's two cores. Peaks and links are as cloud.google.com
publishes them; memory is what libtpu 0.0.42.1 lets a program use. Clocks are not published for all: v5e's follows from
its 197 TFLOP/s, the others are assumed (+-30 % between chips; ratios on one chip are free of them).
"""

import math
from typing import NamedTuple


class Chip(NamedTuple):
    """`clock` (Hz), `hbm` (bytes/s) and `bf16` (FLOP/s of matrix products) are a TensorCore's. `cores` of them make a
    device, which has `memory` bytes of HBM and sends `links` bytes/s over all its links to other chips; `devices` make
    a chip. `topology` is the smallest that the compiler takes, `slices` are the shapes that the planner knows."""

    name: str
    topology: str
    clock: float
    hbm: float
    bf16: float
    cores: int
    devices: int
    memory: int
    links: float
    slices: tuple[str, ...]


_GIB = 2**30
_TWO_DIMENSIONS = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_DIMENSIONS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", 1.5e9, 819e9, 197e12, 1, 1, int(15.75 * _GIB), 200e9, _TWO_DIMENSIONS),
        Chip("v5p", "v5p:2x2x1", 1.75e9, 1382e9, 229.5e12, 2, 1, int(95.74 * _GIB), 600e9, _THREE_DIMENSIONS),
        Chip("v6e", "v6e:2x2", 1.75e9, 1640e9, 918e12, 1, 1, int(31.25 * _GIB), 448e9, _TWO_DIMENSIONS),
        Chip("tpu7x", "tpu7x:2x2x1", 2.2e9, 3690e9, 1153.5e12, 1, 2, int(94.75 * _GIB), 600e9, _THREE_DIMENSIONS),
    )
}


class Topology(NamedTuple):
    """A slice, by the name that libtpu knows it by: "v5p:4x4x4"."""

    name: str
    chip: Chip

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.name.split(":")[1].split("x"))

    @property
    def devices(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.chip.devices


def topologies(chip: str | None = None) -> tuple[Topology, ...]:
    """Returns the known slices, all of them or those of one kind of chip, small ones first."""
    kinds = CHIPS.values() if chip is None else (CHIPS[chip],)
    return tuple(Topology(f"{kind.name}:{shape}", kind) for kind in kinds for shape in kind.slices)


def topology(name: str) -> Topology:
    """Returns the slice of this name. Raises ValueError, which lists the known slices, for any other."""
    for known in topologies():
        if known.name == name:
            return known
    listed = "; ".join(f"{chip.name}:{{{','.join(chip.slices)}}}" for chip in CHIPS.values())
    raise ValueError(f"topology {name!r} is none of {listed}")
