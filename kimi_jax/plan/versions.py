"""Versions of what a plan's numbers come from."""

from importlib import metadata

from sharding.topologies import Topology


def versions(compiled_for: Topology | None) -> dict[str, str]:
    """Returns the versions of kimi-jax and JAX, and that of the compiler where the step was compiled for a slice:
    libtpu, or JAX's plugin for CUDA."""
    names = ["kimi-jax", "jax"]
    if compiled_for is not None:
        names.append("jax-cuda13-plugin" if compiled_for.is_gpu else "libtpu")
    return {name: metadata.version(name) for name in names}
