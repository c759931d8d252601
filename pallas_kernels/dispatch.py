"""Which implementation of an op runs: settled by the platform that a call is lowered for, not by the process's default
backend.

So a CPU host can compile for a TPU. `"mosaic_tpu"`, where an op has one, is Mosaic on TPU; `"xla"` is plain JAX and
runs everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def choose(op: str, implementation: str | None, available: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function to call for `implementation`; with None, Mosaic where the call is lowered for a TPU and XLA
    elsewhere.

    The functions of one op take the same positional arrays and give the same outputs; options are bound beforehand.

    Raises:
      ValueError: the op has no such implementation.
    """
    if implementation is None:
        if "mosaic_tpu" not in available:
            return available["xla"]
        return lambda *arrays: jax.lax.platform_dependent(
            *arrays, tpu=available["mosaic_tpu"], default=available["xla"]
        )
    if implementation not in available:
        raise ValueError(
            f"{op}: implementation {implementation!r} is not available, expected None or one of {sorted(available)}"
        )
    return available[implementation]
