"""Picks a mesh for a slice by arithmetic, and says what would do where nothing fits."""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Iterator

from kimi_jax.config import KimiConfig
from kimi_jax.plan import analytic
from kimi_jax.plan.analytic import Memory, StepBound
from kimi_jax.plan.job import Drafting, Job, Phase, Sizes
from kimi_jax.plan.messages import messages
from kimi_jax.plan.traffic import Collective
from sharding import AXES, StreamLayout
from sharding.topologies import Topology, topologies

# A message on a slice takes microseconds however small it is. Only the choice of a mesh counts them, no bound does.
MESSAGE_SECONDS = 2e-6
Pattern = tuple[KimiConfig, Phase, Drafting | None, type[StreamLayout], bool, tuple[str, ...], tuple[str, ...]]
# The time of all messages, from the first trace of each pattern; it serves all slices.
_latency: dict[Pattern, float] = {}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with the memory of a step on it. Its messages are traced when they are asked for."""

    job: Job
    memory: Memory

    @functools.cached_property
    def sent(self) -> tuple[Collective, ...]:
        """The messages of the step."""
        return messages(self.job, self.job.topology.platform)

    @functools.cached_property
    def step(self) -> StepBound:
        """The lower bounds of the step's time."""
        return analytic.step(self.job, self.sent)

    @property
    def messages(self) -> int:
        """The number of messages."""
        return sum(one.count for one in self.sent)

    @property
    def cost(self) -> float:
        """The number by which candidates are ranked."""
        return self.step.lower_bound_seconds + self.messages * MESSAGE_SECONDS

    @functools.cached_property
    def least_cost(self) -> float:
        """The cost without messages."""
        return analytic.step(self.job, ()).lower_bound_seconds

    @property
    def pattern(self) -> Pattern:
        """The model, the phase, its drafts, the stream's layout and last the axes of several devices: they decide which
        messages there are, sizes aside."""
        job, layout = self.job, self.job.layout
        shown = type(layout), layout.dispatches, layout.token_axes
        return job.config, job.phase, job.draft, *shown, job.partition.mesh_axes

    @property
    def bytes_over(self) -> int:
        """The bytes that a device's memory lacks; 0 where the job fits."""
        return max(0, -self.memory.headroom)


def candidate(job: Job) -> Candidate:
    """Computes the job's candidate. Raises ValueError where the mesh does not divide the job."""
    return Candidate(job, analytic.memory(job))


def candidates(job: Job) -> list[Candidate]:
    """Lists the meshes of the slice's devices that divide the job, in no order.

    A TPU slice runs whole. Of GPUs as many are taken as some mesh divides the job by: 64 of a rack's 72.
    """
    devices = job.topology.devices
    found = _candidates(job, devices)
    while job.topology.is_gpu and not found and devices > 1:
        devices -= 1
        found = _candidates(job, devices)
    return found


def _candidates(job: Job, devices: int) -> list[Candidate]:
    found = []
    for sizes in _factors(devices, len(AXES)):
        try:
            found.append(candidate(dataclasses.replace(job, sizes=sizes)))
        except ValueError:  # it does not divide
            continue
    return found


def ranked(found: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yields those candidates first that fit, the fastest first; of others, those that lack the fewest bytes.

    Messages of a candidate are traced only once it could be the next and fits: a step takes no less than without them,
    and sends as many as on a mesh with the same axes of several devices, whatever their sizes.
    """
    queue = [(one.bytes_over, _least(one), one.job.sizes[::-1], one) for one in found]
    heapq.heapify(queue)
    traced: set[Sizes] = set()
    while queue:
        over, cost, sizes, one = heapq.heappop(queue)
        if over or sizes in traced:
            yield one
            continue
        least = _least(one)
        if least <= cost:
            traced.add(sizes)
            least = one.cost
            _latency[one.pattern] = one.messages * MESSAGE_SECONDS
        heapq.heappush(queue, (over, least, sizes, one))


def _least(one: Candidate) -> float:
    """Computes a cost that the candidate's is at least. More axes of several devices only add messages."""
    *alike, axes = one.pattern
    known = (seconds for (*other, fewer), seconds in _latency.items() if other == alike and set(fewer) <= set(axes))
    return one.least_cost + max(known, default=0.0)


def smallest_that_fits(job: Job) -> Topology | None:
    """Finds the smallest slice of the same chips on which the job fits in some mesh; None where it fits on none."""
    for slice_ in topologies(job.topology.chip.name):
        if any(not one.bytes_over for one in candidates(dataclasses.replace(job, topology=slice_))):
            return slice_
    return None


def _factors(number: int, count: int) -> Iterator[Sizes]:
    if count == 1:
        yield (number,)
        return
    for first in range(1, math.isqrt(number) + 1):
        for divisor in {first, number // first} if number % first == 0 else ():
            for rest in _factors(number // divisor, count - 1):
                yield (divisor, *rest)
