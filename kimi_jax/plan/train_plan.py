"""Plans of training: what a step of quantisation-aware training needs on a slice, and which slices hold it.

The step of a few layers is traced, or compiled, at full width: once with `FIRST` layers with experts, and for each kind
of layer once with one more. The difference is a layer's share, by which the numbers of the whole model are
extrapolated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from kimi_jax.plan.compile import Compiled
from kimi_jax.plan.messages import traced
from kimi_jax.plan.refusal import TooSmallError
from kimi_jax.plan.train_bound import TrainBound, bound, stream_bytes
from kimi_jax.plan.train_job import (
    FORMS,
    TRAINED,
    LayerKind,
    StateForm,
    TrainJob,
    active_parameters,
    counted,
    layers_with_experts,
    num_parameters,
    smallest_slice,
)
from kimi_jax.plan.train_step import trace
from kimi_jax.plan.train_traffic import Messages, added, summed
from kimi_jax.plan.versions import versions
from pallas_kernels.hardware import CHIPS
from sharding.topologies import topologies

# Layers with experts of the shorter program, at least one of each kind
FIRST = 1
Compile = Callable[[TrainJob], Compiled]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Numbers of a program, or of a layer's share of one.

    `arguments` and `beside`, what a device needs beyond them, are bytes, None where nothing was compiled.
    """

    messages: tuple[Messages, ...]
    arguments: int | None
    beside: int | None


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """All bytes are a device's. `measured` is the program of `measured_layers`, `per_layer` one more layer's share by
    kind, and `whole` is extrapolated from the two. `states` are those of `train_job.TRAINED`, `stream` what a gradient
    keeps of the residual stream. `slices` has the smallest slice of each chip that holds the states of each form."""

    model: str
    job: TrainJob
    why: str
    parameters: int
    expert_parameters: int
    active_parameters: float
    states: int
    stream: float
    measured_layers: tuple[LayerKind, ...]
    measured: Measured
    per_layer: dict[LayerKind, Measured]
    whole: Measured
    bound: TrainBound
    slices: dict[str, dict[str, str | None]]
    compiled: tuple[Compiled, ...]
    warnings: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """The most tokens that are trained on in a second."""
        return self.job.rows * self.job.tokens / self.bound.lower_bound_seconds

    @property
    def headroom(self) -> int | None:
        """Bytes that the extrapolated step leaves of a device's memory; None where nothing was compiled."""
        if self.whole.arguments is None or self.whole.beside is None:
            return None
        return self.job.topology.chip.memory - self.whole.arguments - self.whole.beside

    def as_json(self) -> dict[str, Any]:
        """Returns numbers, strings, lists and dicts, which `kimi-jax plan --train --json` prints."""
        job = self.job

        def measured(one: Measured) -> dict[str, Any]:
            sent = [dataclasses.asdict(message) | {"sent": message.sent} for message in one.messages]
            return {"arguments": one.arguments, "beside": one.beside, "messages": sent}

        return {
            "model": self.model,
            "topology": job.topology.name,
            "chips": job.topology.chips,
            "devices": job.topology.devices,
            "mesh": job.mesh,
            "why": self.why,
            "from": "compiled" if self.compiled else "traced",
            "versions": versions(self.job.topology if self.compiled else None),
            "rows": job.rows,
            "tokens": job.tokens,
            "parameters": {
                "all": self.parameters,
                "experts": self.expert_parameters,
                "active": self.active_parameters,
            },
            "memory": {
                "available": job.topology.chip.memory,
                "states": self.states,
                "stream": self.stream,
                "headroom": self.headroom,
            },
            "measured_layers": list(self.measured_layers),
            "measured": measured(self.measured),
            "per_layer": {kind: measured(one) for kind, one in self.per_layer.items()},
            "extrapolated": measured(self.whole),
            "step": dataclasses.asdict(self.bound)
            | {
                "lower_bound_seconds": self.bound.lower_bound_seconds,
                "bound_by": self.bound.bound_by,
                "mfu": self.bound.mfu,
            },
            "tokens_per_second": self.tokens_per_second,
            "slices": self.slices,
            "compiled": [dataclasses.asdict(one) for one in self.compiled],
            "warnings": list(self.warnings),
        }


def train_plan(model: str, job: TrainJob, *, compile_step: Compile | None = None) -> TrainPlan:
    """Plans `job`, on the mesh of its `sizes` or, where these are (), on the one that `choose_sizes` gives.

    `compile_step` (`compile.compiled`) is called for two programs or more; None, and GPUs, which no compiler is asked
    for, count messages of traces alone.
    Raises ValueError where the mesh does not multiply to the devices or does not divide the job, and where the layers
    are of an order that no plan is made for; TooSmallError where a device does not hold its states, naming the smallest
    slice whose devices do.
    """
    why = "given" if job.sizes else "experts and rows divided over `data`, heads over the rest"
    job = job if job.sizes else dataclasses.replace(job, sizes=choose_sizes(job))
    _check(model, job)
    if job.topology.is_gpu:
        compile_step = None
    dense, kinds = layers_with_experts(job.config)
    first = tuple(kinds) * FIRST
    short = job.with_layers(dense, first)
    found = [measure(short, compile_step)]
    found += [measure(job.with_layers(dense, (*first, kind)), compile_step) for kind in kinds]
    base, *longer = (one for one, _ in found)
    per_layer = {kind: _add(more, base, -1) for kind, more in zip(kinds, longer, strict=True)}
    whole = base
    for kind, layer in per_layer.items():
        whole = _add(whole, layer, kinds[kind] - first.count(kind))
    compiled = tuple(made for _, made in found if made is not None)
    return TrainPlan(
        model=model,
        job=job,
        why=why,
        parameters=num_parameters(job.config),
        expert_parameters=num_parameters(job.config, "experts"),
        active_parameters=active_parameters(job.config),
        states=local_states(job),
        stream=stream_bytes(job),
        measured_layers=first,
        measured=base,
        per_layer=per_layer,
        whole=whole,
        bound=bound(job, whole.messages),
        slices={form.name: _smallest(job, form) for form in FORMS},
        compiled=compiled,
        # (Copies are how masters are rounded and gradients turned.)
        warnings=tuple(
            f"{moved.how} of experts: {moved.instruction}"
            for one in compiled
            for moved in one.moved
            if moved.how != "copy"
        ),
    )


def choose_sizes(job: TrainJob) -> tuple[int, ...]:
    """Returns the mesh that shards rows and whole experts over as many devices as both divide by, and heads over the
    rest: over `sequence`, which shards tokens too, or `tensor` where the model has KDA."""
    text, devices = job.config.text, job.topology.devices
    data = math.gcd(devices, job.rows, text.n_routed_experts)
    tensor = devices // data if "kda" in text.layer_kinds else 1
    return data, 1, tensor, devices // data // tensor


def local_states(job: TrainJob) -> int:
    """Computes the bytes of a device's states, under the rules for training, without the vision tower's."""
    partition = job.partition
    local = (
        count * partition.local_size(one.shape, partition.spec(one.axes, one.shape))
        for one, count in counted(job.config)
        if one.kind != "vision"
    )
    return TRAINED.nbytes * sum(local)


def _check(model: str, job: TrainJob) -> None:
    if math.prod(job.sizes) != job.topology.devices:
        raise ValueError(
            f"mesh {job.mesh} asks for {math.prod(job.sizes)} devices, {job.topology.name} has {job.topology.devices}"
        )
    if job.rows % job.mesh["data"]:
        raise ValueError(f"a batch of {job.rows} rows cannot be sharded over a data axis of {job.mesh['data']}")
    if not 1 <= job.tokens <= (room := job.config.text.max_position_embeddings):
        raise ValueError(f"rows of {job.tokens} tokens: expected 1 to max_position_embeddings = {room}")
    need, available = local_states(job), job.topology.chip.memory
    if need > available:
        enough = smallest_slice(job.config, TRAINED, job.topology.chip.name)
        would = f"no known {job.topology.chip.name} slice does" if enough is None else f"{enough.name} does"
        message = (
            f"a step of {model} has states of {need / 1e9:.1f} GB on a device of {job.topology.name}, which has "
            f"{available / 1e9:.1f} GB; {would}"
        )
        raise TooSmallError(message, need, available, None if enough is None else enough.name)


def measure(job: TrainJob, compile_step: Compile | None) -> tuple[Measured, Compiled | None]:
    """Compiles the step of all of the job's layers, or where `compile_step` is None traces it."""
    if compile_step is None:
        # Slices of as many devices have the same messages
        platform = "cuda" if job.topology.is_gpu else "tpu"
        return Measured(_traced(dataclasses.replace(job, topology=topologies()[0]), platform), None, None), None
    made = compile_step(job)
    return Measured(summed(made.collectives), made.arguments, made.beside_arguments), made


@functools.cache
def _traced(job: TrainJob, platform: str) -> tuple[Messages, ...]:
    mesh = job.partition.mesh
    assert mesh is not None
    return summed(traced(trace(job, mesh).jaxpr.jaxpr, job.mesh, platform))


def _add(one: Measured, other: Measured, times: int) -> Measured:
    """Adds `times` another's numbers."""

    def total(a: int | None, b: int | None) -> int | None:
        return None if a is None or b is None else a + times * b

    return Measured(
        added(one.messages, other.messages, times),
        total(one.arguments, other.arguments),
        total(one.beside, other.beside),
    )


def _smallest(job: TrainJob, form: StateForm) -> dict[str, str | None]:
    found = {chip: smallest_slice(job.config, form, chip) for chip in CHIPS}
    return {chip: None if slice_ is None else slice_.name for chip, slice_ in found.items()}
