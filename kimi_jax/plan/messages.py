"""Messages of a step that is not compiled, read off traces of the program that runs it.

JAX traces the real program over abstract devices, with shapes for values and one layer of each kind, whose messages
count for all such layers. Ops send nothing, and only their shapes are traced. A compiler may then merge small messages,
and writes some in another form.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import AbstractMesh, Mesh

from kimi_jax.model.block import Block
from kimi_jax.model.context import Phase
from kimi_jax.model.eagle import abstract_head
from kimi_jax.model.kimi import Kimi
from kimi_jax.model.param import placed
from kimi_jax.plan.job import Job, bits, pool_sizes, shortened
from kimi_jax.plan.traffic import Collective, ragged_operand
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.program import Program
from pallas_kernels.dispatch import shapes_only
from sharding import AXES, StreamLayout
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

_HALF = re.compile(r"\bhalf (\d+)")


def trace(program: Program, job: Job, layers: Sequence[int] | None = None) -> Any:
    """Traces the job's step; `layers` are the numbers of those that the program's model has left, None for all."""
    pages, slots = pool_sizes(job.batch, job.context, job.partition)
    cache = program.cache_shapes(pages, slots)
    if layers is not None:
        cache = cache._replace(layers=tuple(cache.layers[number] for number in layers))
    phase: Phase = job.phase if job.draft is None else "verify"
    batch = program.batch_shapes(phase, job.batch, job.chunk, pages // job.batch)
    if job.draft is None:
        return program.jitted.logits.trace(program.arrays, cache, batch)
    return program.jitted.verify.trace(program.arrays, cache, batch, program.head_arrays)


def program_of(job: Job, model: Kimi, mesh: Mesh | AbstractMesh) -> Program:
    """Returns the program of a job's steps, with shapes for the weights of its draft head. Of a model that has not all
    layers the head takes the output of the first alone."""
    if job.draft is None or job.draft.head is None:
        return Program(model)
    head = job.draft.head
    if len(model.model.layers) < job.config.text.num_hidden_layers:
        head = dataclasses.replace(head, aux_layers=(0,) * head.num_aux)
    return Program(model, EagleDrafter(abstract_head(head, mesh=mesh), model), job.draft.tokens)


def messages(job: Job, platform: str = "tpu") -> tuple[Collective, ...]:
    """Lists the messages of the job's step on a platform, the largest first.

    Of a loop whose length depends on values one turn counts, and of a conditional all branches.
    """
    if job.partition.devices == 1:
        return ()
    # Slices of as many devices have the same messages
    return _messages(dataclasses.replace(job, topology=topologies()[0]), platform)


class _Halves(nnx.Module):
    """The token mixer of a block, and the feed-forward layers of several. The equations of each have a number in their
    name stack: the mixer's kind's, and those of `forwards`."""

    def __init__(self, mixer: Block, number: int, forwards: dict[int, Block]):
        self.mixer, self.number = mixer, number
        self.numbers, self.forwards = tuple(forwards), nnx.List(forwards.values())

    def __call__(self, x: Any, context: Any, cache: Any, layout: StreamLayout) -> tuple[Any, Any]:
        with jax.named_scope(f"half {self.number}"):
            x, cache = self.mixer.mix_tokens(x, context, cache, layout)
        for number, block in zip(self.numbers, self.forwards, strict=True):
            with jax.named_scope(f"half {number}"):
                x = block.feed_forward(x, layout)
        return x, cache


def traced(jaxpr: Jaxpr, mesh: dict[str, int], platform: str = "tpu") -> tuple[Collective, ...]:
    """Lists the messages of a program over devices in `mesh`, the largest first, counted as `messages` does."""
    total: Counter[Collective] = Counter()
    for message, times, _ in _sent(jaxpr, mesh, platform):
        total[message] += times
    return _listed(total)


def _listed(total: Counter[Collective]) -> tuple[Collective, ...]:
    listed = [dataclasses.replace(message, count=times) for message, times in total.items()]
    return tuple(sorted(listed, key=lambda one: (-one.count * one.nbytes, one)))


@functools.cache
def _messages(job: Job, platform: str) -> tuple[Collective, ...]:
    mesh, text = job.partition.mesh, job.config.text
    assert mesh is not None
    model = placed(shortened(job.config), mesh)
    # A text step has no use for the vision tower
    model.vision_tower = model.mm_projector = None
    blocks, of_mixer = model.model.layers, list(text.layer_kinds)
    of_forward = [text.is_moe(number) for number in range(text.num_hidden_layers)]
    first = [*map(of_mixer.index, dict.fromkeys(of_mixer)), *map(of_forward.index, dict.fromkeys(of_forward))]
    counts = [*Counter(of_mixer).values(), *Counter(of_forward).values()]
    mixers = len(set(of_mixer))
    forwards = {number: blocks[first[number]] for number in range(mixers, len(first))}
    halves: Any = [_Halves(blocks[first[number]], number, {} if number else forwards) for number in range(mixers)]
    model.model.layers = nnx.List(halves)
    with shapes_only(True):
        jaxpr = trace(program_of(job, model, mesh), job, first[:mixers]).jaxpr
    total: Counter[Collective] = Counter()
    for message, times, half in _sent(jaxpr.jaxpr, job.mesh, platform):
        total[message] += times * (1 if half is None else counts[half])
    return _listed(total)


def _sent(jaxpr: Jaxpr, mesh: dict[str, int], platform: str) -> Iterator[tuple[Collective, int, int | None]]:
    """Yields a jaxpr's messages, each with a count of one, how often it is sent, and the half of a layer, None at the
    step's ends."""
    for equation in jaxpr.eqns:
        numbered = _HALF.search(str(equation.source_info.name_stack))
        layer = None if numbered is None else int(numbered[1])
        if equation.primitive.name in _KINDS:
            message = _message(equation, mesh)
            if message.group > 1:
                yield message, 1, layer
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        in_loop = equation.primitive.name == "while"
        for inner in _inner(equation, platform):
            for message, count, nested in _sent(inner, mesh, platform):
                message = dataclasses.replace(message, in_loop=message.in_loop or in_loop)
                yield message, count * times, nested if layer is None else layer


def _message(equation: JaxprEqn, mesh: dict[str, int]) -> Collective:
    kind, names = _KINDS[equation.primitive.name]
    among = equation.params[names]
    axes = tuple(name for name in AXES if name in ((among,) if isinstance(among, str) else among))
    sizes = [_nbytes(x.aval) for x in equation.invars]
    nbytes, to_all = sum(sizes), False
    if kind == "ragged-all-to-all":
        source: Any = equation.invars[0].aval
        nbytes, to_all = ragged_operand(sizes, source.shape[0])
    return Collective(kind, axes, math.prod(mesh[name] for name in axes), nbytes, 1, to_all=to_all)


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
