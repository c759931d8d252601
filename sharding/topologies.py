"""Slices that the planner knows: shapes of TPUs, and numbers of GPUs, of the chips of `pallas_kernels.hardware`."""

import difflib
import math
from typing import Literal, NamedTuple

from pallas_kernels.hardware import CHIPS, GPUS, Chip, Gpu

_TWO_DIMENSIONS = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_DIMENSIONS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# GPUs that one NVLink joins: of a host, or of a rack, whose trays have four.
_HOST, _RACK = ("1", "2", "4", "8"), ("4", "8", "16", "32", "64", "72")
# Of each chip, small ones first; the first of a TPU is the smallest that the compiler takes.
SHAPES = {
    "v5e": _TWO_DIMENSIONS,
    "v5p": _THREE_DIMENSIONS,
    "v6e": _TWO_DIMENSIONS,
    "tpu7x": _THREE_DIMENSIONS,
    "h100": _HOST,
    "h200": _HOST,
    "b200": _HOST,
    "gb200": _RACK,
    "rtx-4090": ("1", "2", "4"),
}


class Topology(NamedTuple):
    """A slice, by the name that libtpu knows it by, "v5p:4x4x4", or GPUs with their number, "h100:8"."""

    name: str
    chip: Chip | Gpu

    @property
    def is_gpu(self) -> bool:
        """Tells whether the slice is of GPUs: each sends to any other directly, and some may stay idle."""
        return isinstance(self.chip, Gpu)

    @property
    def platform(self) -> Literal["tpu", "cuda"]:
        """JAX's name of the platform that its programs are lowered for."""
        return "cuda" if self.is_gpu else "tpu"

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.name.split(":")[1].split("x"))

    @property
    def devices(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.chip.devices


def topologies(chip: str | None = None) -> tuple[Topology, ...]:
    """Returns all that are known, or those of one kind of chip, small ones first."""
    kinds = SHAPES if chip is None else (chip,)
    return tuple(Topology(f"{kind}:{shape}", (CHIPS | GPUS)[kind]) for kind in kinds for shape in SHAPES[kind])


def topology(name: str) -> Topology:
    """Returns the slice of this name. Raises ValueError, naming those that there are, for any other."""
    for known in topologies():
        if known.name == name:
            return known
    listed = "; ".join(f"{kind}:{{{','.join(shapes)}}}" for kind, shapes in SHAPES.items())
    near = difflib.get_close_matches(name, [known.name for known in topologies()], 1)
    raise ValueError(f"topology {name!r} is none of {listed}{f'; did you mean {near[0]}?' if near else ''}")
