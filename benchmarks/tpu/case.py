"""One measured call of a kernel: what to compile, how often its loops run, and what it must move and multiply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pallas_kernels.hardware import CHIPS
from tpu.compile import compile_for
from tpu.schedule import Loop


@dataclass(frozen=True)
class Case:
    """`build` gives the function and its ShapeDtypeStructs; `trips` how often each loop of the kernel runs in the whole
    call, in the order of `schedule.read_kernel` without depth 0 (both are called with the chip as
    `pallas_kernels.hardware.chip` sees it).

    `units` of `unit` are done by the call; `hbm_bytes` and `flops` are what the kernel moves and multiplies at least
    (the roofline).
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
    """What the schedule says: seconds are the call's, `ratio` is time over the roofline (the larger of HBM and MXU)."""

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
        """Time over the roofline. (A schedule may take less than the matrix unit: it knows no stalls.)"""
        roofline = max(self.hbm_seconds, self.mxu_seconds)
        return max(self.seconds, roofline) / roofline


def measure(case: Case, chip_name: str) -> Row:
    """Compiles the case for one core of the chip and adds up its loops.

    Raises:
      ValueError: the kernel has other loops than `trips` names.
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
