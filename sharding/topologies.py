"""TPU slices: the shapes that the planner knows, of the chips of `pallas_kernels.hardware`."""

import difflib
import math
from typing import NamedTuple

from pallas_kernels.hardware import CHIPS, Chip

_TWO_DIMENSIONS = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_DIMENSIONS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Of each chip, small ones first; the first is the smallest that the compiler takes.
SHAPES = {"v5e": _TWO_DIMENSIONS, "v5p": _THREE_DIMENSIONS, "v6e": _TWO_DIMENSIONS, "tpu7x": _THREE_DIMENSIONS}


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
    """Returns all that are known, or those of one kind of chip, small ones first."""
    kinds = SHAPES if chip is None else (chip,)
    return tuple(Topology(f"{kind}:{shape}", CHIPS[kind]) for kind in kinds for shape in SHAPES[kind])


def topology(name: str) -> Topology:
    """Returns the slice of this name. Raises ValueError, naming those that there are, for any other."""
    for known in topologies():
        if known.name == name:
            return known
    listed = "; ".join(f"{kind}:{{{','.join(shapes)}}}" for kind, shapes in SHAPES.items())
    near = difflib.get_close_matches(name, [known.name for known in topologies()], 1)
    raise ValueError(f"topology {name!r} is none of {listed}{f'; did you mean {near[0]}?' if near else ''}")
