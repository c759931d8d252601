"""The list of slices that plans are made for."""

from pallas_kernels.hardware import CHIPS, GPUS, Gpu
from sharding.topologies import SHAPES


def lines() -> list[str]:
    """Returns two lines for each kind of chip: a device's numbers, and the shapes of slices."""
    found = []
    for name, shapes in SHAPES.items():
        chip = (CHIPS | GPUS)[name]
        devices = "" if chip.devices == 1 else f", {chip.devices} a chip"
        how = "in arithmetic" if isinstance(chip, Gpu) and chip.facts is None else "compiled"
        found += [
            f"{name}: {chip.memory / 1e9:.0f} GB, {chip.hbm * chip.cores / 1e9:,.0f} GB/s, "
            f"{chip.bf16 * chip.cores / 1e12:,.0f} TFLOP/s a device{devices}; {how}",
            f"  {' '.join(shapes)}",
        ]
    return [*found, "", "A slice is a name and a shape: --topology v5p:4x8x8, --topology h100:8"]
