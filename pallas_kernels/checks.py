"""Checks that refuse bad arguments with one clear line, which says what was found and what was expected."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def checks_arguments(function: Function) -> Function:
    """Marks a function that refuses bad arguments itself, so that tests do not check its annotations at run time."""
    function.__no_type_check__ = True  # type: ignore[attr-defined]
    return function


def bind_shapes(op: str, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Returns the sizes of the named axes of `name=(array, "B T H 64")`.

    A number is a fixed size; a name that occurs several times must have one size. Weights of any format are arrays
    here.

    Raises:
      ValueError: an array's rank or one of its sizes is not what its pattern says.
    """
    sizes: dict[str, int] = {}
    for name, (array, pattern) in arguments.items():
        axes, shape = pattern.split(), array.shape if hasattr(array, "shape") else jnp.shape(array)
        expected = [int(axis) if axis.isdigit() else sizes.get(axis, axis) for axis in axes]
        if len(shape) != len(axes) or any(
            isinstance(want, int) and want != size for want, size in zip(expected, shape, strict=True)
        ):
            wanted = ", ".join(
                f"{axis}={want}" if str(want) != axis else axis for axis, want in zip(axes, expected, strict=True)
            )
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected [{wanted}]")
        for axis, size in zip(axes, shape, strict=True):
            if not axis.isdigit() and sizes.setdefault(axis, size) != size:
                raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected its axes {axis!r} to agree")
    return sizes


def check_dtype(op: str, name: str, array: Any, *allowed: Any) -> None:
    """Raises ValueError unless the array's dtype is one of `allowed` (dtypes, or kinds such as jnp.floating)."""
    found = jnp.result_type(array)
    if not any(jnp.issubdtype(found, kind) for kind in allowed):
        wanted = " or ".join(
            jnp.dtype(kind).name if kind not in (jnp.floating, jnp.integer) else kind.__name__ for kind in allowed
        )
        raise ValueError(f"{op}: {name} is {found}, expected {wanted}")


def known(array: Any) -> np.ndarray | None:
    """Returns the array's values where they can be read (outside of any tracing), else None."""
    return None if array is None or isinstance(array, jax.core.Tracer) else np.asarray(array)
