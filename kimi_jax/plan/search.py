"""Picks a mesh for a slice by arithmetic, and says what would do where nothing fits."""

import dataclasses
import math
from collections.abc import Iterator

from kimi_jax.plan.analytic import Memory, StepBound, expected_collectives, memory, step
from kimi_jax.plan.job import Job, Sizes
from sharding import AXES
from sharding.topologies import Topology, topologies

# A message on a slice takes microseconds however small it is. Only the choice of a mesh counts them, no bound does.
MESSAGE_SECONDS = 2e-6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with the memory and traffic of a step on it."""

    job: Job
    memory: Memory
    step: StepBound
    messages: int

    @property
    def cost(self) -> float:
        """The number by which candidates are ranked."""
        return self.step.lower_bound_seconds + self.messages * MESSAGE_SECONDS

    @property
    def bytes_over(self) -> int:
        """The bytes that a device's memory lacks; 0 where the job fits."""
        return max(0, -self.memory.headroom)


def candidate(job: Job) -> Candidate:
    """Computes the job's candidate. Raises ValueError where the mesh does not divide the job."""
    sent = expected_collectives(job)
    return Candidate(job, memory(job), step(job, sent), sum(collective.count for collective in sent))


def candidates(job: Job) -> list[Candidate]:
    """Lists the meshes of the slice's devices that divide the job, those that fit first, the fastest first."""
    found = []
    for sizes in _factors(job.topology.devices, len(AXES)):
        try:
            found.append(candidate(dataclasses.replace(job, sizes=sizes)))
        except ValueError:  # it does not divide
            continue
    return sorted(found, key=lambda one: (one.bytes_over, one.cost, one.job.sizes[::-1]))


def smallest_that_fits(job: Job) -> Topology | None:
    """Finds the smallest slice of the same chips on which the job fits in some mesh; None where it fits on none."""
    for slice_ in topologies(job.topology.chip.name):
        best = candidates(dataclasses.replace(job, topology=slice_))
        if best and not best[0].bytes_over:
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
