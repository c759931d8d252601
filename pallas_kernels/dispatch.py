"""Choice of an op's implementation by the platform that a call is lowered for, not by the process's default backend.

So a CPU host can compile for a TPU. `"mosaic_tpu"`, where an op has one, is the Pallas kernel: Mosaic on TPU, and the
same kernel interpreted elsewhere; `"xla"` is plain JAX and runs everywhere; None is Mosaic on TPU and XLA elsewhere.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax


def choose(
    op: str, implementation: str | None, available: Mapping[str, Callable[..., Any]], unsupported: str | None = None
) -> Callable[..., Any]:
    """Returns the function to call for `implementation`.

    The functions of one op take the same positional arrays and give the same outputs; options are bound beforehand.
    A "mosaic_tpu" also takes the keyword `interpret`. `unsupported` says why the kernel cannot serve this call: None
    then falls to XLA, and asking for the kernel raises.

    Raises:
      ValueError: the op has no such implementation, or the kernel cannot serve the call.
    """
    if implementation not in (None, *available):
        raise ValueError(
            f"{op}: implementation {implementation!r} is not available, expected None or one of {sorted(available)}"
        )
    if implementation == "xla" or "mosaic_tpu" not in available or (implementation is None and unsupported):
        return available["xla"]
    if unsupported:
        raise ValueError(f"{op}: the mosaic_tpu kernel cannot serve this call: {unsupported}")
    kernel = available["mosaic_tpu"]
    elsewhere = available["xla"] if implementation is None else partial(kernel, interpret=True)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=_compiled(kernel), default=elsewhere)


def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the kernel jitted, so that it is traced and lowered once for all layers of a model that call it alike.

    A closure, which is made anew for every call, is traced each time.
    """
    function, options = (kernel.func, kernel.keywords) if isinstance(kernel, partial) else (kernel, {})
    if getattr(function, "__closure__", None):
        return partial(kernel, interpret=False)
    return _once(function, tuple(sorted(options.items())))


@cache
def _once(kernel: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(partial(kernel, **dict(options), interpret=False))


def with_gradient(run: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `run` with the gradient of `twin`, the same function in a form that JAX can differentiate."""

    @jax.custom_vjp
    def function(*arrays: Any) -> Any:
        return run(*arrays)

    def forward(*arrays: Any) -> tuple[Any, Any]:
        return run(*arrays), arrays

    def backward(arrays: Any, cotangents: Any) -> Any:
        return jax.vjp(twin, *arrays)[1](cotangents)

    function.defvjp(forward, backward)
    return function
