"""The memory that a plan leaves with other batches and contexts on its mesh, by arithmetic."""

import dataclasses

from kimi_jax.plan import analytic
from kimi_jax.plan.job import Job

SHORTEST, BATCHES = 1024, 12  # tokens of the shortest context, and the most batches that are looked at


@dataclasses.dataclass(frozen=True)
class Headroom:
    """Bytes that are left on a device: a row of `headroom` for each of `contexts`, with a number for each of `batches`.
    `largest` has the largest batch that fits with each context, 0 where none does."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    headroom: tuple[tuple[int, ...], ...]
    largest: tuple[int, ...]


def headroom(job: Job, temporaries: int | None = None) -> Headroom:
    """Computes what is left for batches and contexts that double, up to the model's longest context and beyond the
    largest batch; `temporaries` are those compiled for the job, and their growth is estimated."""
    longest = job.config.text.max_position_embeddings
    contexts = _doubled(min(SHORTEST, longest), longest)
    largest = tuple(analytic.largest_batch(analytic.with_context(job, context), temporaries) for context in contexts)
    data = job.mesh["data"]
    batches = _doubled(data, max(2 * max(largest), 2 * job.batch, data))[:BATCHES]
    rows = [
        tuple(
            analytic.headroom(dataclasses.replace(analytic.with_context(job, context), batch=batch), job, temporaries)
            for batch in batches
        )
        for context in contexts
    ]
    return Headroom(batches, contexts, tuple(rows), largest)


def _doubled(first: int, last: int) -> tuple[int, ...]:
    """Lists `first`, twice as much and so on, and `last`."""
    count = max(0, (last // first).bit_length() - 1)
    found = [first << i for i in range(count + 1)]
    return tuple(found if found[-1] == last else [*found, last])
