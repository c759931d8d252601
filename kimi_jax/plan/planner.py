"""Plans say whether a model fits on a slice, with how much context and batch, and what a step moves."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from kimi_jax.config import KimiConfig, QuantizationConfig
from kimi_jax.plan import analytic
from kimi_jax.plan.analytic import EnginePools, Memory, PerLayer, StepBound
from kimi_jax.plan.compile import Compiled, DoesNotFitError
from kimi_jax.plan.headroom import Headroom, headroom
from kimi_jax.plan.job import Job, Sizes, words
from kimi_jax.plan.refusal import GB, TooSmallError
from kimi_jax.plan.search import MESSAGE_SECONDS, Candidate, candidate, candidates, ranked, smallest_that_fits
from kimi_jax.plan.traffic import Collective
from kimi_jax.plan.versions import versions
from pallas_kernels.hardware import Chip
from sharding import AXES

Compile = Callable[[Job], Compiled]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Another mesh, by arithmetic. `per_layer` is the last layer's share."""

    mesh: dict[str, int]
    headroom: int
    lower_bound_seconds: float
    messages: int
    per_layer: PerLayer


@dataclasses.dataclass(frozen=True)
class Plan:
    """All bytes are a device's. `why` says where the mesh comes from. `collectives` are the compiled program's, or
    without one those of the step's traces (`plan.messages`). `confirmed` says whether the compiler fits `largest_batch`
    too, None where it was not asked. `others` has what other batches and contexts leave. `engine` are the pools of an
    engine with `job.batch` slots, None where there is no room for them."""

    model: str
    job: Job
    why: str
    memory: Memory
    per_layer: PerLayer
    step: StepBound
    collectives: tuple[Collective, ...]
    largest_batch: int
    largest_context: int
    others: Headroom
    engine: EnginePools | None
    confirmed: bool | None
    alternatives: tuple[Alternative, ...]
    compiled: Compiled | None
    warnings: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """The most tokens that all rows get in a second: those of a step, all drafts taken for right, over its lower
        bound."""
        return self.job.tokens / self.step.lower_bound_seconds

    def as_json(self) -> dict[str, Any]:
        """Returns numbers, strings, lists and dicts, which `kimi-jax plan --json` prints."""
        job, compiled = self.job, self.compiled
        return {
            "model": self.model,
            "topology": job.topology.name,
            "chips": job.topology.chips,
            "devices": job.topology.devices,
            "mesh": job.mesh,
            "why": self.why,
            "from": "arithmetic" if compiled is None else "compiled",
            "versions": versions(None if compiled is None else job.topology),
            "phase": job.phase,
            "batch": job.batch,
            "context": job.context,
            "chunk": job.chunk,
            "draft": None if job.draft is None else {"tokens": job.draft.tokens, "by": job.draft.by},
            "memory": dataclasses.asdict(self.memory) | {"headroom": self.memory.headroom},
            "per_layer": dataclasses.asdict(self.per_layer),
            "step": dataclasses.asdict(self.step)
            | {"lower_bound_seconds": self.step.lower_bound_seconds, "bound_by": self.step.bound_by},
            "tokens_per_second": self.tokens_per_second,
            "collectives": [dataclasses.asdict(one) | {"sent": one.sent} for one in self.collectives],
            "largest": {"batch": self.largest_batch, "context": self.largest_context, "confirmed": self.confirmed},
            "others": dataclasses.asdict(self.others),
            "engine": None if self.engine is None else dataclasses.asdict(self.engine),
            "alternatives": [dataclasses.asdict(one) for one in self.alternatives],
            "compiled": None if compiled is None else dataclasses.asdict(compiled),
            "warnings": list(self.warnings),
        }


def plan(model: str, job: Job, *, sizes: Sizes | None = None, compile_step: Compile | None = None) -> Plan:
    """Plans `job` on a mesh of `sizes`, the best one where None; `model` is its name in the report.

    `compile_step` (`compile.compiled`) is called for the job and once more for the largest batch; None leaves out what
    only a compiler knows.
    Raises ValueError where the mesh does not multiply to the devices or does not divide the job, and TooSmallError
    where the model does not fit, by how much and what would do.
    """
    _check(job)
    found = candidates(job)
    if sizes is None:
        if not found:
            raise ValueError(f"no mesh of {job.topology.name}'s {job.topology.devices} devices divides {model}")
        chosen, why = next(ranked(found)), _why(found)
    else:
        idle = job.topology.devices - math.prod(sizes)
        if idle < 0 or (idle and not job.topology.is_gpu):
            raise ValueError(
                f"mesh {words(dict(zip(AXES, sizes, strict=True)))} asks for {math.prod(sizes)} devices, "
                f"{job.topology.name} has {job.topology.devices}"
            )
        chosen, why = candidate(dataclasses.replace(job, sizes=sizes)), "given"
    if chosen.bytes_over:
        raise _too_small(model, chosen)
    job = chosen.job
    made = None if compile_step is None else _compile(model, job, compile_step)
    beside = None if made is None else made.beside_arguments
    sent = chosen.sent if made is None else made.collectives
    memory = analytic.memory(job, beside)
    batch = max(job.batch, analytic.largest_batch(job, beside))  # the job itself does fit
    return Plan(
        model=model,
        job=job,
        why=why,
        memory=memory,
        per_layer=analytic.per_layer(job),
        step=analytic.step(job, sent, _small_seconds(job, made)),
        collectives=sent,
        largest_batch=batch,
        largest_context=analytic.largest_context(job, beside),
        others=headroom(job, beside),
        engine=analytic.engine_pools(job),
        confirmed=None if compile_step is None else _fits(job, batch, compile_step),
        alternatives=tuple(_alternatives(job, found)),
        compiled=made,
        warnings=() if made is None else tuple(_warnings(memory, made)),
    )


def _check(job: Job) -> None:
    room = job.config.text.max_position_embeddings
    if job.batch < 1 or not 1 <= job.context <= room:
        raise ValueError(
            f"a batch of {job.batch} rows of {job.context} tokens: expected at least one row, "
            f"and 1 to max_position_embeddings = {room} tokens"
        )
    if job.draft is not None and (job.phase != "decode" or job.chunk != 1 + job.draft.tokens):
        raise ValueError(
            f"a {job.phase} step of {job.chunk} tokens a row and {job.draft.tokens} drafts: expected a decode step of "
            "one token a row and its drafts"
        )
    if not 1 <= job.chunk <= job.context:
        raise ValueError(f"a chunk of {job.chunk} tokens: expected 1 to the context's {job.context}")


def _why(found: list[Candidate]) -> str:
    fit = sum(not one.bytes_over for one in found)
    return (
        f"the least lower bound of the {fit} meshes that fit of {len(found)} that divide the job, "
        f"with {MESSAGE_SECONDS * 1e6:.0f} us assumed for each message"
    )


def _too_small(model: str, chosen: Candidate) -> TooSmallError:
    memory, job = chosen.memory, chosen.job
    need = memory.available + chosen.bytes_over
    enough = smallest_that_fits(job)
    int4 = _in_int4(job)
    chip = job.topology.chip.name
    would = [f"no known {chip} slice would do" if enough is None else f"{enough.name} would do"]
    would += [] if int4 is None else [f"with --experts int4 {int4 / GB:.1f} GB would do"]
    message = (
        f"{model} with {job.batch} x {job.context} tokens does not fit on {job.topology.name} with mesh "
        f"{words(job.mesh)}: a device would need {need / GB:.1f} GB of its {memory.available / GB:.1f}, "
        f"{chosen.bytes_over / GB:.1f} GB too much; {', '.join(would)}"
    )
    return TooSmallError(message, need, memory.available, None if enough is None else enough.name, int4)


def _in_int4(job: Job) -> int | None:
    """Computes the bytes that a device needs with the experts in INT4; None where they are, or do not fit either."""
    if job.config.text.quantization is not None or not job.config.text.n_routed_experts:
        return None
    found = candidates(dataclasses.replace(job, config=with_experts(job.config, "int4")))
    fit = [one.memory.available - one.memory.headroom for one in found if not one.bytes_over]
    return min(fit, default=None)


def with_experts(config: KimiConfig, form: Literal["int4", "bf16"]) -> KimiConfig:
    """Returns the configuration of the model with its routed experts in this form, as `kimi-jax convert` makes it."""
    if form == "bf16":
        return config.dense()
    return dataclasses.replace(config, text=dataclasses.replace(config.text, quantization=QuantizationConfig()))


def _small_seconds(job: Job, made: Compiled | None) -> float:
    chip = job.topology.chip
    return made.small_cycles / chip.clock if made is not None and isinstance(chip, Chip) else 0.0


def _compile(model: str, job: Job, compile_step: Compile) -> Compiled:
    try:
        return compile_step(job)
    except DoesNotFitError as error:
        raise ValueError(
            f"{model} with {job.batch} x {job.context} tokens should fit on {job.topology.name} with mesh "
            f"{words(job.mesh)}, but the compiler says: {error}"
        ) from error


def _fits(job: Job, batch: int, compile_step: Compile) -> bool:
    """Tells whether the compiler fits this batch, given that it fits the job's own."""
    try:
        if batch > job.batch:
            compile_step(dataclasses.replace(job, batch=batch))
    except DoesNotFitError:
        return False
    return True


def _alternatives(job: Job, found: list[Candidate]) -> list[Alternative]:
    """Lists the best mesh that leaves a row's cache whole and the best that shards it, except the chosen one."""
    kinds = ([one for one in found if (one.job.mesh["sequence"] > 1) is split] for split in (False, True))
    best = [next(ranked(kind), None) for kind in kinds]
    return [
        Alternative(
            one.job.mesh,
            one.memory.headroom,
            one.step.lower_bound_seconds,
            one.messages,
            analytic.per_layer(one.job),
        )
        for one in best
        if one is not None and one.job.sizes != job.sizes
    ]


def _warnings(memory: Memory, made: Compiled) -> list[str]:
    alike: dict[tuple[str, int], list[str]] = {}
    for moved in made.moved:
        alike.setdefault((moved.how, moved.nbytes), []).append(moved.instruction)
    said = []
    for (how, size), (first, *rest) in alike.items():
        what = "a gather" if how != "copy" else "a copy in HBM"
        more = f" and {len(rest)} more, each" if rest else ""
        said.append(f"{what} of weights: {how} {first}{more} of {size / 1e6:.1f} MB")
    counted = memory.weights + memory.cache
    if abs(made.arguments - counted) > 0.03 * counted:
        said.append(f"the compiler counts {made.arguments:,} bytes of weights and cache, this plan {counted:,}")
    return said
