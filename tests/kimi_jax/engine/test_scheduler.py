"""Any requests in any order: no page is lost or owned twice, every request ends, each with the tokens it has alone."""

from collections import Counter
from random import Random

import pytest
from fake_device import FakeDevice, every_page, whole_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.engine.pages import PagePool, Placeholders, extend_keys
from kimi_jax.engine.scheduler import AGEING, Scheduler
from kimi_jax.engine.sequence import Sequence, Status
from kimi_jax.engine.shard import Shard
from kimi_jax.engine.snapshots import SnapshotPool
from kimi_jax.model.context import PAGE

CHUNK = 2 * PAGE


def make_scheduler(pages=8, slots=3, shards=1, parts=1, places=None, packed=1):
    pools = [
        Shard(PagePool(pages, parts), list(range(slots)), None if places is None else SnapshotPool(places))
        for _ in range(shards)
    ]
    return Scheduler(pools, CHUNK, packed)


class Run:
    """A scheduler and its device, read one step behind, as the engine does it."""

    def __init__(self, scheduler):
        self.scheduler, self.device = scheduler, FakeDevice(scheduler.shards[0].snapshots is not None)
        self.before, self.ended = [], []

    def step(self):
        step = self.scheduler.plan()
        now = self.device.run(step)
        self.check()
        for sequence, token, finished in self.before:
            if sequence.status is not Status.DONE:
                self.scheduler.read(sequence, token)
                if finished:
                    self.scheduler.finish(sequence)
                    self.ended.append(sequence)
        self.before = now
        return step

    def check(self):
        """Asserts that a page is free or owned as often as it counts users, and a slot free or of one sequence."""
        for number, shard in enumerate(self.scheduler.shards):
            owned = Counter(every_page(shard.running))
            users = {(number, page.part, page.number): page.users for s in shard.running for page in s.pages}
            assert owned == users and len(owned) + shard.pages.free == shard.pages.pages
            slots = [sequence.slot for sequence in shard.running] + shard.slots
            assert len(slots) == len(set(slots)) and -1 not in slots

    def until_idle(self, limit=5000):
        for _ in range(limit):
            self.step()
            if not (self.before or self.scheduler.running or self.scheduler.waiting):
                return
        raise AssertionError(f"not idle after {limit} steps")


def sequence(number, length, new, prefix=0, priority=0):
    """Returns a sequence whose first `prefix` tokens all such sequences share."""
    tokens = [1 + i % 40 for i in range(prefix)] + [1 + (7 * number + i * i) % 40 for i in range(length - prefix)]
    return Sequence(tokens, length + new, number, priority)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1, None), (1, 1, 3), (2, 2, 2), (1, 3, None), (2, 1, 0)]))
def test_any_requests_in_any_order(seed, shape):
    random, (shards, parts, places) = Random(seed), shape
    scheduler = make_scheduler(9 if parts == 1 else 4, 3, shards, parts, places, packed=random.choice([1, 2]))
    run, asked, cancelled = Run(scheduler), [], set()
    room = (9 if parts == 1 else 4 * parts) * PAGE
    for number in range(14):
        length = random.choice([1, 5, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 300, 420])
        new = random.choice([1, 2, 40, 150, room - length])
        prefix = random.choice([0, 0, length // 2, length])
        asked.append(sequence(number, length, min(new, room - length), prefix, random.randrange(3)))
        scheduler.add(asked[-1])
        for _ in range(random.choice([0, 1, 3, 30])):
            run.step()
        if random.random() < 0.2:
            victim = random.choice(asked)
            if victim.status is not Status.DONE:
                scheduler.finish(victim)
                cancelled.add(victim)
    run.until_idle()
    for shard in scheduler.shards:
        assert shard.pages.free == shard.pages.pages and len(shard.slots) == 3
    assert len(run.ended) + len(cancelled) == 14
    for one in run.ended:
        assert one.tokens == whole_answer(one.tokens[: one.prompt], one.ends)


def test_a_prefix_is_computed_once():
    """1,500 shared tokens, 700 of each: from the second on all 11 full pages of the prefix are found."""
    for places in (None, 8):
        scheduler = make_scheduler(pages=60, slots=2, places=places)
        run = Run(scheduler)
        for number in range(4):
            one = sequence(number, 2200, 3, prefix=1500)
            one.boundaries = (1500,)
            scheduler.add(one)
            run.until_idle()
            assert one.cached == (0 if number == 0 else 11 * PAGE)
            assert one.tokens == whole_answer(one.tokens[:2200], one.ends)


def test_where_prefixes_part_a_state_is_copied():
    """Without a known boundary the second request finds where texts part, and copies there; the third begins there."""
    scheduler = make_scheduler(pages=60, slots=2, places=4)
    run = Run(scheduler)
    found = []
    for number in range(3):
        scheduler.add(one := sequence(number, 700, 2, prefix=3 * PAGE + 5))
        run.until_idle()
        found.append(one.cached)
    assert found[0] == 0 and found[2] == 3 * PAGE


def test_two_pictures_with_equal_placeholders_are_two_prefixes():
    tokens, keys = [7] * (2 * PAGE), []
    for content in (b"a", b"b", b"a"):
        keys.append([])
        extend_keys(keys[-1], tokens, [Placeholders(130, 140, content)])
    assert keys[0] == keys[2] and keys[0][0] == keys[1][0] and keys[0][1] != keys[1][1]


def test_nobody_waits_for_ever():
    """A request of low priority is served though more urgent ones keep coming."""
    scheduler = make_scheduler(pages=4, slots=1)
    run, low = Run(scheduler), sequence(0, 10, 3)
    scheduler.add(sequence(1, 10, 3, priority=1))
    scheduler.add(low)
    for number in range(2, 2 * AGEING):
        scheduler.add(sequence(number, 10, 1, priority=1))
        run.step()
        run.step()
        if low.status is Status.DONE:
            break
    assert low.status is Status.DONE


def test_urgent_requests_go_first_and_preempt():
    """The newest of the lowest priority gives up its pages, and ends with its own tokens all the same."""
    scheduler = make_scheduler(pages=6, slots=2)
    run = Run(scheduler)
    low, high = sequence(0, 2 * PAGE, 3 * PAGE), sequence(1, 2 * PAGE, 3 * PAGE, priority=5)
    scheduler.add(low)
    for _ in range(3):
        run.step()
    scheduler.add(high)
    order = []
    while len(order) < 2:
        run.step()
        order = run.ended
    assert [one.tokens for one in order] == [whole_answer(one.tokens[: 2 * PAGE], one.ends) for one in order]


@pytest.mark.parametrize("recurrent", [False, True])
def test_numbers_that_are_not_finite_are_found_by_nobody(recurrent):
    scheduler = make_scheduler(pages=20, places=4 if recurrent else None)
    run, bad = Run(scheduler), sequence(0, 300, 5)
    scheduler.add(bad)
    run.step()
    run.step()
    scheduler.finish(bad, sound=False)
    assert not scheduler.has_prefix(sequence(0, 300, 5))
    run.until_idle()
    scheduler.add(again := sequence(0, 300, 5))
    run.until_idle()
    assert again.cached == 0 and scheduler.has_prefix(sequence(0, 256, 5))
