"""Ordered backends of an op, and the choice among them by the platform that a call is lowered for.

The process's default backend plays no part, so a CPU host can compile for a TPU. An op lists its backends in order of
preference, "mosaic_tpu", a Pallas kernel for TPUs, before "xla", plain JAX for any platform. A kernel for another
platform is one more entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax

# Within `with shapes_only(True)` ops return zeros of their results' shapes. The planner, which reads the program around
# them, then traces it several times as fast; jit keeps such traces apart from others.
shapes_only = jax.make_user_context(default_value=False)


def accept(*arrays: Any) -> str | None:
    """Refuses no call."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way of computing an op.

    `run` takes the op's positional arrays and returns its outputs, both alike for all backends of the op; options are
    bound beforehand. `refuse` takes the same arrays and says why `run` cannot serve them, None where it can.
    `platforms` are the ones that JAX compiles a kernel for ("tpu", "cuda", "rocm"); its `run` also takes the keyword
    `interpret`. A backend without platforms is compiled for any.
    """

    name: str
    run: Callable[..., Any]
    platforms: tuple[str, ...] = ()
    refuse: Callable[..., str | None] = accept


def choose(op: str, implementation: str | None, backends: Sequence[Backend], *arrays: Any) -> Callable[..., Any]:
    """Returns the function to call with `arrays`.

    On each platform it is the first of `backends` that serves the platform and does not refuse the arrays. The backend
    that `implementation` names is taken on every platform, interpreted where it cannot be compiled.

    Raises:
      ValueError: the op has no backend of this name, or that backend refuses the arrays, or all backends do.
    """
    names = [backend.name for backend in backends]
    if implementation not in (None, *names):
        raise ValueError(
            f"{op}: implementation {implementation!r} is not available, expected None or one of {sorted(names)}"
        )
    if implementation is not None:
        return _asked_for(op, backends[names.index(implementation)], *arrays)
    reasons = [backend.refuse(*arrays) for backend in backends]
    if all(reasons):
        listed = "; ".join(f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True))
        raise ValueError(f"{op}: no implementation can serve this call: {listed}")
    kernels: dict[str, Callable[..., Any]] = {}
    for backend, reason in zip(backends, reasons, strict=True):
        if reason:
            continue
        if not backend.platforms:
            return _by_platform(kernels, backend.run)
        kernels = dict.fromkeys(backend.platforms, _compiled(backend.run)) | kernels
    return _by_platform(kernels, None)


def _asked_for(op: str, backend: Backend, *arrays: Any) -> Callable[..., Any]:
    if reason := backend.refuse(*arrays):
        raise ValueError(f"{op}: the {backend.name} kernel cannot serve this call: {reason}")
    if not backend.platforms:
        return backend.run
    kernels = dict.fromkeys(backend.platforms, _compiled(backend.run))
    return _by_platform(kernels, partial(backend.run, interpret=True))


def _by_platform(kernels: dict[str, Callable[..., Any]], elsewhere: Callable[..., Any] | None) -> Callable[..., Any]:
    """Returns the function that is a platform's entry of `kernels`, or `elsewhere` on platforms without one."""
    if shapes_only.value and elsewhere is not None:
        return partial(_zeros, *_parts(elsewhere))
    if not kernels and elsewhere is not None:
        return elsewhere
    return lambda *arrays: jax.lax.platform_dependent(*arrays, default=elsewhere, **kernels)


def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the kernel jitted, so that it is traced and lowered once for all layers of a model that call it alike.

    A closure, which is made anew for every call, is traced each time.
    """
    function, options = _parts(kernel)
    if getattr(function, "__closure__", None):
        return partial(kernel, interpret=False)
    return _once(function, options)


def _parts(run: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[tuple[str, Any], ...]]:
    """Returns a function and the options that `partial` has bound to it."""
    return (run.func, tuple(sorted(run.keywords.items()))) if isinstance(run, partial) else (run, ())


def _zeros(run: Callable[..., Any], options: tuple[tuple[str, Any], ...], *arrays: Any) -> Any:
    leaves, tree = jax.tree.flatten(arrays)
    shapes = _result(run, options, tree, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)


@cache
def _result(
    run: Callable[..., Any], options: tuple[tuple[str, Any], ...], tree: jax.tree_util.PyTreeDef, *leaves: Any
) -> Any:
    return jax.eval_shape(partial(run, **dict(options)), *jax.tree.unflatten(tree, leaves))


@cache
def _once(kernel: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(partial(kernel, **dict(options), interpret=False))


def with_gradient(run: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `run` with the gradient of `twin`, the same function in a form that JAX can differentiate; within
    `shapes_only`, `run` alone."""
    if run is twin:
        return run
    return with_backward(run, lambda arrays, cotangents: jax.vjp(twin, *arrays)[1](cotangents))


def differentiated_as(run: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `run`, in place of which a gradient computes `twin`, the same function, and keeps what it needs of it;
    within `shapes_only`, `run` alone.

    `with_gradient` keeps no more than the arguments, and computes `twin` in the backward pass, after `run`.
    """
    if shapes_only.value:
        return run

    @jax.custom_vjp
    def function(*arrays: Any) -> Any:
        return run(*arrays)

    function.defvjp(lambda *arrays: jax.vjp(twin, *arrays), lambda pull, cotangents: pull(cotangents))
    return function


def with_backward(run: Callable[..., Any], backward: Callable[[tuple[Any, ...], Any], Any]) -> Callable[..., Any]:
    """Returns `run` with the gradient backward(arrays, cotangents); within `shapes_only`, `run` alone."""
    if shapes_only.value:
        return run

    @jax.custom_vjp
    def function(*arrays: Any) -> Any:
        return run(*arrays)

    function.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return function
