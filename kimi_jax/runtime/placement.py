"""Says what programs for some devices are compiled with, and how the shardings of their results are spelled."""

from typing import Any

from jax.sharding import AbstractMesh, PartitionSpec, Sharding


def compiler_options(placement: Sharding) -> tuple[tuple[str, int], ...]:
    """Returns what a step for the placement's devices is compiled with.

    For GPUs XLA makes one product of several with the same operand, for which it copies their weights side by side at
    each step: a limit of no megabytes stops it.
    """
    # Shapes may be on an abstract mesh, which has no devices
    devices: Any = () if isinstance(getattr(placement, "mesh", None), AbstractMesh) else placement.device_set
    on_gpus = any(device.platform in ("gpu", "cuda") for device in devices)
    return (("xla_gpu_dot_merger_threshold_mb", 0),) if on_gpus else ()


def as_returned(spec: PartitionSpec) -> PartitionSpec:
    """Returns a spec as that of a step's result: without None at its end. In another spelling the first step's cache
    would compile the second step again."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)
