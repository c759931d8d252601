"""The table of chips: what kernels, the planner and the benchmarks know of the hardware.

Peaks and links are as cloud.google.com/tpu/docs publishes them (v5e, v5p, v6e, tpu7x); memory is what libtpu 0.0.42.1
lets a program use; `facts` agree with JAX's `pltpu.get_tpu_info`. Clocks are not published for all: v5e's follows from
its 197 TFLOP/s, the others are assumed (+-30 % between chips; ratios on one chip are free of them).

GPUs have the numbers of NVIDIA's data sheets and architecture white papers.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu


class ChipFacts(NamedTuple):
    """The facts that a kernel needs while it is traced for a chip.

    `bf16_vpu` tells whether the vector unit computes in bf16 (from v6e on), `vmem` is the bytes of a TensorCore's
    vector memory, and `cores` the number of TensorCores that make a device and share its kernels. `fp4` tells whether
    it converts float4_e2m1fn and int4 to float8_e4m3fn, which its matrix unit takes.
    """

    bf16_vpu: bool
    vmem: int
    cores: int
    fp4: bool = False


@dataclass(frozen=True)
class Chip:
    """A kind of TPU, by the name that libtpu knows it by. A JAX device is a chip, save on tpu7x, where a chip has two.

    `clock` (Hz), `hbm` (bytes/s) and `bf16` (FLOP/s of matrix products) are a TensorCore's. A device has `memory` bytes
    of HBM and sends `links` bytes/s over all its links to other chips. `devices` make a chip.
    """

    name: str
    facts: ChipFacts
    clock: float
    hbm: float
    bf16: float
    memory: int
    links: float
    devices: int = 1

    @property
    def cores(self) -> int:
        """The number of TensorCores that make a device."""
        return self.facts.cores


MIB, GIB = 2**20, 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            ChipFacts(bf16_vpu=False, vmem=128 * MIB, cores=1),
            clock=1.5e9,
            hbm=819e9,
            bf16=197e12,
            memory=int(15.75 * GIB),
            links=200e9,
        ),
        Chip(
            "v5p",
            ChipFacts(bf16_vpu=False, vmem=64 * MIB, cores=2),
            clock=1.75e9,
            hbm=1382e9,
            bf16=229.5e12,
            memory=int(95.74 * GIB),
            links=600e9,
        ),
        Chip(
            "v6e",
            ChipFacts(bf16_vpu=True, vmem=128 * MIB, cores=1),
            clock=1.75e9,
            hbm=1640e9,
            bf16=918e12,
            memory=int(31.25 * GIB),
            links=448e9,
        ),
        Chip(
            "tpu7x",
            ChipFacts(bf16_vpu=True, vmem=64 * MIB, cores=1, fp4=True),
            clock=2.2e9,
            hbm=3690e9,
            bf16=1153.5e12,
            memory=int(94.75 * GIB),
            links=600e9,
            devices=2,
        ),
    )
}


class GpuFacts(NamedTuple):
    """The facts that XLA compiles for: the name that the driver gives the GPU, its compute capability, number of
    multiprocessors and boost clock (Hz), and the bytes of its second-level cache."""

    description: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    l2: int


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, which is one JAX device.

    `memory` is the data sheet's (1 GB is 10^9 bytes: what a GPU has beyond that the driver and CUDA take), `hbm` in
    bytes/s, `bf16` in FLOP/s of dense products that are summed in float32, half the data sheet's where that counts
    sparse ones. It sends `links` bytes/s, half of the data sheet's NVLink, which counts both directions.
    Programs are compiled for those with `facts` where they are not here.
    """

    name: str
    memory: int
    hbm: float
    bf16: float
    links: float
    facts: GpuFacts | None = None
    devices: ClassVar[int] = 1
    cores: ClassVar[int] = 1


# Memory is what `nvidia-smi` shows as a device's total; the round numbers of data sheets are up to 8 % less.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 80 GB, 3.35 TB/s, 1,979 TFLOPS with sparsity, NVLink 900 GB/s
        Gpu(
            "h100",
            memory=81559 * MIB,
            hbm=3350e9,
            bf16=989.5e12,
            links=450e9,
            facts=GpuFacts("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98e9, 50 * MIB),
        ),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: 141 GB, 4.8 TB/s, 1,979 TFLOPS with sparsity, NVLink 900 GB/s
        Gpu(
            "h200",
            memory=143771 * MIB,
            hbm=4800e9,
            bf16=989.5e12,
            links=450e9,
            facts=GpuFacts("NVIDIA H200", (9, 0), 132, 1.98e9, 50 * MIB),
        ),
        # NVIDIA DGX B200 data sheet, eight GPUs: 1,440 GB, 64 TB/s, FP8 72 PFLOPS with sparsity (bf16 is half of FP8),
        # NVLink 14.4 TB/s
        Gpu("b200", memory=183359 * MIB, hbm=8000e9, bf16=2250e12, links=900e9),
        # NVIDIA GB200 NVL72 data sheet, 72 GPUs: 13.4 TB, 576 TB/s, bf16 360 PFLOPS with sparsity, NVLink 130 TB/s
        Gpu("gb200", memory=189471 * MIB, hbm=8000e9, bf16=2500e12, links=900e9),
        # NVIDIA Ada GPU Architecture white paper, appendix A: 24 GB, 1,008 GB/s, 165.2 dense TFLOPS with sums in
        # float32; no NVLink, but PCI Express 4.0 with sixteen lanes, 32 GB/s each way
        Gpu(
            "rtx-4090",
            memory=24564 * MIB,
            hbm=1008e9,
            bf16=165.2e12,
            links=32e9,
            facts=GpuFacts("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52e9, 72 * MIB),
        ),
    )
}
# The shape of a vector register of any TPU, and of a float32 array's tiles in memory.
SUBLANES, LANES = 8, 128
# The bytes of vector memory that a kernel for all of them may take: three quarters of the smallest.
VMEM_LIMIT = min(chip.facts.vmem for chip in CHIPS.values()) // 4 * 3


def chip() -> ChipFacts:
    """Returns the facts of the default device or of the abstract mesh in use; a v6e's where neither is a TPU.

    They are JAX's own, which has TPUs beyond the table too and knows whether the cores of this device are taken as one.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return CHIPS["v6e"].facts
    return ChipFacts(info.generation >= 6, info.vmem_capacity_bytes, info.num_cores, info.generation >= 7)


def tpu_in_use() -> AbstractContextManager[Any]:
    """Returns a context in which JAX has a TPU to ask for its facts: a v6e where neither the default device nor the
    mesh in use is one, so that kernels that emit pipelines are interpreted there."""
    try:
        pltpu.get_tpu_info()
    except ValueError:
        device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
        # (of no axes: JAX refuses values that lie on another mesh than the one in use)
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    return nullcontext()
