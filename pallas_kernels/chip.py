"""Facts of a TPU that kernels need while they are traced for it."""

from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu


class Chip(NamedTuple):
    """A chip with or without vector arithmetic in bf16 (`bf16_vpu`, from v6e on).

    `mxu` is the number of a matrix unit's columns, `vmem` the bytes of a core's vector memory, `cores` the number of a
    device's cores (two on v5p).
    """

    bf16_vpu: bool
    mxu: int
    vmem: int
    cores: int = 1


_V6E = Chip(bf16_vpu=True, mxu=256, vmem=128 * 2**20)


def chip() -> Chip:
    """Returns the chip of the default device or of the abstract mesh in use; a v6e where neither is a TPU."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return _V6E
    return Chip(info.generation >= 6, info.mxu_column_size, info.vmem_capacity_bytes, info.num_cores)
