"""NVIDIA GPUs that are not here, as compilation targets: XLA for CUDA compiles to machine code without a GPU or driver.

It takes the chip's limits as a description in words (XLA's `GpuTargetConfigProto`; openxla/xla has such files in
xla/backends/gpu/target_config/specs), and the assembler from wheels: the extra `gpu-compile`. What it cannot do there
is tune by timing.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from pallas_kernels.hardware import Gpu
from sharding.topologies import Topology

# What all chips of a compute capability have: bytes of shared memory of a multiprocessor and of a block, and threads.
_LIMITS = {8: (102400, 101376, 1536), 9: (233472, 232448, 2048), 10: (233472, 232448, 2048)}


def toolkit() -> Path | None:
    """Returns the folder of the CUDA assembler's wheels, None where they or JAX's plugin for CUDA are not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(root) / "cu13" for root in spec.submodule_search_locations or ()]
    found = next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), None)
    plugin = importlib.util.find_spec("jax_cuda13_plugin")
    return None if plugin is None else found


def environment() -> dict[str, str]:
    """Returns what a process that compiles for GPUs has in its environment before XLA starts.

    Raises ValueError where the compiler is not installed.
    """
    root = toolkit()
    if root is None:
        raise ValueError("the compiler for NVIDIA GPUs is not installed (pip install 'kimi-jax[gpu-compile]')")
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={root} --xla_gpu_autotune_level=0",
        "PATH": os.pathsep.join([str(root / "bin"), os.environ.get("PATH", "")]),
    }


def target_config(gpu: Gpu) -> str:
    """Describes the GPU to XLA. Raises ValueError for one whose facts are not known."""
    facts = gpu.facts
    if facts is None:
        raise ValueError(f"{gpu.name}: expected a GPU that is described to the compiler, as h100 and h200 are")
    major, minor = facts.capability
    shared, of_block, threads = _LIMITS[major]
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": of_block,
        "shared_memory_per_core": shared,
        "threads_per_core_limit": threads,
        "core_count": facts.multiprocessors,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(gpu.hbm),
        "l2_cache_size": facts.l2,
        "clock_rate_ghz": facts.clock / 1e9,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    listed = " ".join(f"{name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{ {listed} cuda_compute_capability {{ major: {major} minor: {minor}{features} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
        f'device_description_str: "{facts.description}"'
    )


def devices(topology: Topology) -> list[Any]:
    """Returns JAX's devices of GPUs that are not here; `environment` has to be this process's."""
    from jax.experimental import topologies

    assert isinstance(topology.chip, Gpu)
    target = target_config(topology.chip)
    shape = f"1x1x{topology.devices}"
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=topology.name, target_config=target, topology=shape
    )
    return list(found.devices)
