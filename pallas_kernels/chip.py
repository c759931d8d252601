"""What a kernel needs to know of the TPU it is traced for."""

from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu


class Chip(NamedTuple):
    """`bf16_vpu`: vector arithmetic in bf16 (v6e on); `mxu`: columns of a matrix unit; `vmem`: vector memory of a
    core, bytes; `cores` of a device: two on v5p."""

    bf16_vpu: bool
    mxu: int
    vmem: int
    cores: int = 1


_V6E = Chip(bf16_vpu=True, mxu=256, vmem=128 * 2**20)


def chip() -> Chip:
    """The chip of the default device or of the abstract mesh in use; a v6e where neither is a TPU."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return _V6E
    return Chip(info.generation >= 6, info.mxu_column_size, info.vmem_capacity_bytes, info.num_cores)
