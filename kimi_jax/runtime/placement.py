"""Says what programs for some devices are compiled with, and how the shardings of their results are spelled."""

from typing import Any

from jax.sharding import AbstractMesh, PartitionSpec, Sharding


def compiler_options(placement: Sharding) -> tuple[tuple[str, int], ...]:
    """Returns what a step for the placement's devices is compiled with.

    For GPUs XLA makes one product of several with the same operand, for which it copies their weights side by side at
    each step: a limit of no megabytes stops it.
    """
    on_gpus = bool(_platforms(placement) & {"gpu", "cuda"})
    return (("xla_gpu_dot_merger_threshold_mb", 0),) if on_gpus else ()


def is_on_cpu(placement: Sharding) -> bool:
    """Tells whether the placement's devices are CPUs."""
    return "cpu" in _platforms(placement)


def _platforms(placement: Sharding) -> set[str]:
    """Returns the platforms of the placement's devices; of an abstract mesh, which has none, the empty set."""
    devices: Any = () if isinstance(getattr(placement, "mesh", None), AbstractMesh) else placement.device_set
    return {device.platform for device in devices}


def as_returned(spec: PartitionSpec) -> PartitionSpec:
    """Returns a spec as that of a step's result: without None at its end. In another spelling the first step's cache
    would compile the second step again."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)
