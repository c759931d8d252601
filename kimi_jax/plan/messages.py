"""Messages of a step that is not compiled, read off traces of the program that runs it.

JAX traces the real program over abstract devices, with shapes for values: one layer of each kind, and the step's ends,
which have no layers. Ops send nothing, and only their shapes are traced. A compiler may then merge small messages, and
writes some in another form.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from kimi_jax.model.kimi import placed
from kimi_jax.plan.job import Job, bits, first_alike, pool_sizes, shortened
from kimi_jax.plan.traffic import Collective, ragged_bytes
from kimi_jax.runtime.cache import Cache
from kimi_jax.runtime.program import Program
from pallas_kernels.dispatch import shapes_only
from sharding import AXES
from sharding.topologies import topologies

# HLO's name of what JAX's primitives do, and the parameter that has their mesh axes.
_KINDS = {
    "psum": ("all-reduce", "axes"),
    "psum_invariant": ("all-reduce", "axes"),
    "pmax": ("all-reduce", "axes"),
    "pmin": ("all-reduce", "axes"),
    "all_gather": ("all-gather", "axis_name"),
    "all_gather_invariant": ("all-gather", "axis_name"),
    "reduce_scatter": ("reduce-scatter", "axis_name"),
    "ppermute": ("collective-permute", "axis_name"),
    "all_to_all": ("all-to-all", "axis_name"),
    "ragged_all_to_all": ("ragged-all-to-all", "axis_name"),
}


def trace(program: Program, job: Job, layers: tuple[int, ...] | None = None) -> Any:
    """Traces the job's step; `layers` are the numbers of those that the program's model has left, None for all."""
    pages, slots = pool_sizes(job.batch, job.context, job.partition)
    cache = program.cache_shapes(pages, slots)
    if layers is not None:
        cache = Cache(tuple(cache.layers[number] for number in layers))
    batch = program.batch_shapes(job.phase, job.batch, job.chunk, pages // job.batch)
    return program.jitted.logits.trace(program.arrays, cache, batch)


def messages(job: Job, platform: str = "tpu") -> tuple[Collective, ...]:
    """Lists the messages of the job's step on a platform, the largest first.

    Of a loop whose length depends on values one turn counts, and of a conditional all branches.
    """
    if job.partition.devices == 1:
        return ()
    # Slices of as many devices have the same messages
    return _messages(dataclasses.replace(job, topology=topologies()[0]), platform)


@functools.cache
def _messages(job: Job, platform: str) -> tuple[Collective, ...]:
    mesh = job.partition.mesh
    assert mesh is not None
    model = placed(shortened(dataclasses.replace(job.config, vision=None)), mesh)
    blocks = list(model.model.layers)

    def found(*layers: int) -> Counter[Collective]:
        model.model.layers = nnx.List([blocks[number] for number in layers])
        with shapes_only(True):
            jaxpr = trace(Program(model), job, layers).jaxpr
        once: Counter[Collective] = Counter()
        for message, times in _sent(jaxpr.jaxpr, job.mesh, platform):
            once[message] += times
        return once

    ends = found()
    total = Counter(ends)
    for number, count in Counter(first_alike(job.config)).items():
        of_layer = found(number)
        of_layer.subtract(ends)
        total.update({message: count * times for message, times in of_layer.items()})
    listed = [dataclasses.replace(message, count=times) for message, times in total.items() if times]
    return tuple(sorted(listed, key=lambda one: (-one.count * one.nbytes, one)))


def _sent(jaxpr: Jaxpr, mesh: dict[str, int], platform: str) -> Iterator[tuple[Collective, int]]:
    """Yields a jaxpr's messages, each with a count of one, and how often it is sent."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _KINDS:
            message = _message(equation, mesh)
            if message.group > 1:
                yield message, 1
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        in_loop = equation.primitive.name == "while"
        for inner in _inner(equation, platform):
            for message, count in _sent(inner, mesh, platform):
                yield dataclasses.replace(message, in_loop=message.in_loop or in_loop), count * times


def _message(equation: JaxprEqn, mesh: dict[str, int]) -> Collective:
    kind, names = _KINDS[equation.primitive.name]
    among = equation.params[names]
    axes = tuple(name for name in AXES if name in ((among,) if isinstance(among, str) else among))
    sizes = [_nbytes(x.aval) for x in equation.invars]
    nbytes = ragged_bytes(sizes) if kind == "ragged-all-to-all" else sum(sizes)
    return Collective(kind, axes, math.prod(mesh[name] for name in axes), nbytes, 1)


def _nbytes(array: Any) -> int:
    return math.prod(array.shape) * bits(array.dtype) // 8


def _inner(equation: JaxprEqn, platform: str) -> list[Jaxpr]:
    """Lists the jaxprs that an equation runs, of a choice by platform only this platform's."""
    params = dict(equation.params)
    if platforms := params.get("branches_platforms"):
        chosen = next(i for i, names in enumerate(platforms) if names is None or platform in names)
        params = {"branch": params["branches"][chosen]}
    fields = (field if isinstance(field, tuple | list) else (field,) for field in params.values())
    found = [value.jaxpr if isinstance(value, ClosedJaxpr) else value for field in fields for value in field]
    return [value for value in found if isinstance(value, Jaxpr)]
