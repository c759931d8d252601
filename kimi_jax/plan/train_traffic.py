"""Messages of a training step summed by kind, so that those of a layer can be told and multiplied."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from kimi_jax.plan.traffic import Collective


@dataclasses.dataclass(frozen=True, order=True)
class Messages:
    """All messages of one kind, among devices that differ in the same mesh `axes`, `group` of them.

    `nbytes` are those of all their operands on a device. `in_loop`: they are sent in each turn of a loop of unknown
    length, of which one turn counts (a round of `sharding.pair_dispatch`, one where experts are chosen evenly).
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    in_loop: bool
    count: int
    nbytes: int

    @property
    def sent(self) -> float:
        """The least bytes that a device has to send for them."""
        return Collective(self.kind, self.axes, self.group, self.nbytes, 1).sent


def summed(collectives: Sequence[Collective]) -> tuple[Messages, ...]:
    """Sums messages by kind, mesh axes and loop, those with the most bytes first."""
    return _messages(_counted(collectives))


def added(one: Sequence[Messages], other: Sequence[Messages], times: int) -> tuple[Messages, ...]:
    """Adds `times` the numbers of other messages; -1 subtracts."""
    numbers = _numbers(one)
    for key, (count, nbytes) in _numbers(other).items():
        before = numbers.get(key, (0, 0))
        numbers[key] = before[0] + times * count, before[1] + times * nbytes
    return _messages(numbers)


Numbers = dict[tuple[str, tuple[str, ...], int, bool], tuple[int, int]]


def _numbers(messages: Sequence[Messages]) -> Numbers:
    return {(one.kind, one.axes, one.group, one.in_loop): (one.count, one.nbytes) for one in messages}


def _counted(collectives: Sequence[Collective]) -> Numbers:
    counts: Counter[tuple[str, tuple[str, ...], int, bool]] = Counter()
    sizes: Counter[tuple[str, tuple[str, ...], int, bool]] = Counter()
    for one in collectives:
        key = one.kind, one.axes, one.group, one.in_loop
        counts[key] += one.count
        sizes[key] += one.count * one.nbytes
    return {key: (counts[key], sizes[key]) for key in counts}


def _messages(numbers: Numbers) -> tuple[Messages, ...]:
    found = [Messages(*key, count, nbytes) for key, (count, nbytes) in numbers.items() if count or nbytes]
    return tuple(sorted(found, key=lambda one: (-one.sent, one)))
