"""Picks a mesh for a slice by arithmetic, and says what would do where nothing fits."""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Iterator

from kimi_jax.plan import analytic
from kimi_jax.plan.analytic import Memory, StepBound
from kimi_jax.plan.job import Job, Sizes
from kimi_jax.plan.messages import messages
from kimi_jax.plan.traffic import Collective
from sharding import AXES, SINGLE_DEVICE, StreamLayout
from sharding.topologies import Topology, topologies

# A message on a slice takes microseconds however small it is. Only the choice of a mesh counts them, no bound does.
MESSAGE_SECONDS = 2e-6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with the memory of a step on it. Its messages are traced when they are asked for."""

    job: Job
    memory: Memory

    @functools.cached_property
    def sent(self) -> tuple[Collective, ...]:
        """The messages of the step."""
        return messages(self.job)

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
    def pattern(self) -> tuple[StreamLayout, tuple[str, ...]]:
        """The stream's layout and the axes of several devices: they decide which messages there are, sizes aside."""
        layout = self.job.layout
        return dataclasses.replace(layout, partition=SINGLE_DEVICE), self.job.partition.mesh_axes

    @property
    def bytes_over(self) -> int:
        """The bytes that a device's memory lacks; 0 where the job fits."""
        return max(0, -self.memory.headroom)


def candidate(job: Job) -> Candidate:
    """Computes the job's candidate. Raises ValueError where the mesh does not divide the job."""
    return Candidate(job, analytic.memory(job))


def candidates(job: Job) -> list[Candidate]:
    """Lists the meshes of the slice's devices that divide the job, in no order."""
    found = []
    for sizes in _factors(job.topology.devices, len(AXES)):
        try:
            found.append(candidate(dataclasses.replace(job, sizes=sizes)))
        except ValueError:  # it does not divide
            continue
    return found


def ranked(found: Iterable[Candidate]) -> Iterator[Candidate]:
    """Yields those candidates first that fit, the fastest first.

    Messages of a candidate are traced only once it could be the next: a step takes no less than without them, and sends
    as many as on a mesh with the same axes of several devices, whatever their sizes.
    """
    queue = [(one.bytes_over, one.least_cost, one.job.sizes[::-1], one) for one in found]
    heapq.heapify(queue)
    traced: set[Sizes] = set()
    latency: dict[object, float] = {}
    while queue:
        over, cost, sizes, one = heapq.heappop(queue)
        if sizes in traced:
            yield one
            continue
        least = one.least_cost + latency.get(one.pattern, 0.0)
        if least <= cost:
            traced.add(sizes)
            least = one.cost
            latency[one.pattern] = one.messages * MESSAGE_SECONDS
        heapq.heappush(queue, (over, least, sizes, one))


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
