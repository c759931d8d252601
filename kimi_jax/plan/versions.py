"""Versions of what a plan's numbers come from."""

from importlib import metadata


def versions(*, compiled: bool) -> dict[str, str]:
    """Returns the versions of kimi-jax and JAX, and where the step was `compiled` that of libtpu."""
    names = ("kimi-jax", "jax", "libtpu") if compiled else ("kimi-jax", "jax")
    return {name: metadata.version(name) for name in names}
