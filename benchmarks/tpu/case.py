"""Describes and measures one call of a kernel: the function to compile, its loops' trips, its least bytes and FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pallas_kernels.hardware import CHIPS
from tpu.compile import compile_for
from tpu.schedule import Loop


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    build: returns the function and its ShapeDtypeStructs.
    trips: returns how often each loop of the kernel runs in the whole call, in the order of `schedule.read_kernel`
        without depth 0. Both are called with the chip's abstract mesh in use, where
        `pallas_kernels.hardware.chip` finds it.
    units, unit: the call does `units` of `unit`.
    hbm_bytes, flops: the least that the kernel has to move and multiply (the roofline).
    """

    name: str
    kernel: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    trips: Callable[[], tuple[int, ...]]
    units: float
    unit: str
    hbm_bytes: float
    flops: float
    donate: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """The result of a case on a chip; seconds are those of the whole call."""

    case: str
    chip: str
    bundles_per_unit: float
    seconds: float
    hbm_seconds: float
    mxu_seconds: float
    spills: int
    temporaries: int
    glue: list[str]
    loops: list[Loop]

    @property
    def ratio(self) -> float:
        """Returns the time over the roofline, the larger of HBM and MXU, but at least 1: a schedule knows no stalls, so
        its time may be less."""
        roofline = max(self.hbm_seconds, self.mxu_seconds)
        return max(self.seconds, roofline) / roofline


def measure(case: Case, chip_name: str) -> Row:
    """Compiles the case for one core of the chip and adds up the bundles of its loops times their trips.

    Raises ValueError where the kernel has more or fewer loops than `trips` names.
    """
    chip = CHIPS[chip_name]
    compiled, trips = compile_for(chip_name, case.build, case.trips, case.kernel, case.donate)
    outside, *loops = compiled.loops
    if len(loops) != len(trips):
        raise ValueError(
            f"{case.name}: {case.kernel} has {len(loops)} loops on {chip_name} (depth, bundles: "
            f"{[(loop.depth, loop.bundles) for loop in loops]}), trips names {len(trips)}: {trips}"
        )
    bundles = outside.bundles + sum(loop.bundles * trip for loop, trip in zip(loops, trips, strict=True))
    return Row(
        case=case.name,
        chip=chip_name,
        bundles_per_unit=bundles / case.units,
        seconds=bundles / chip.clock,
        hbm_seconds=case.hbm_bytes / chip.hbm,
        mxu_seconds=case.flops / chip.bf16,
        spills=sum(loop.spills for loop in loops),
        temporaries=compiled.temporaries,
        glue=compiled.glue,
        loops=compiled.loops,
    )
