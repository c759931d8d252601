"""Tokens that sequences are forced to go on with: no page is lost, and the device computes each of them once."""

from random import Random

import pytest
from fake_device import FakeDevice, every_page, next_token

from kimi_jax.engine.pages import PagePool
from kimi_jax.engine.scheduler import Scheduler
from kimi_jax.engine.sequence import Sequence, Status
from kimi_jax.engine.shard import Shard
from kimi_jax.engine.snapshots import SnapshotPool
from kimi_jax.model.context import PAGE


@pytest.mark.parametrize("places", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_forced_runs_among_other_sequences(seed, places):
    # Given a pool too small for all, and sequences that wait for their token, some of which are now and then forced to
    # go on with up to two pages of tokens
    random, slots, pages = Random(seed), 3, 8
    scheduler = Scheduler([Shard(PagePool(pages), list(range(slots)), places and SnapshotPool(places))], 2 * PAGE, 2)
    device, before, ended, forced = FakeDevice(places is not None), [], [], {}
    sequences = [
        Sequence([1 + (7 * n + i) % 40 for i in range(random.choice([1, PAGE, 200]))], 600, n, stepwise=n % 3 > 0)
        for n in range(8)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
        forced[sequence] = {}
    for _ in range(8000):
        step = scheduler.plan()
        now = device.run(step)
        owned = list(every_page(scheduler.running))
        assert len(owned) == len(set(owned)) + sum(
            page.users - 1 for page in {page for s in scheduler.running for page in s.pages}
        )
        for sequence, tokens, finished in before:
            if sequence.status is Status.DONE:
                continue
            scheduler.read(sequence, *tokens)
            room = sequence.ends - len(sequence.tokens) - 1
            if finished:
                scheduler.finish(sequence)
                ended.append(sequence)
            elif sequence.stepwise and room > 0 and random.random() < 0.05:
                assert not sequence.unread
                run = [1 + random.randrange(40) for _ in range(random.randint(1, min(room, 2 * PAGE)))]
                forced[sequence].update(enumerate(run, len(sequence.tokens)))
                scheduler.extend(sequence, run)
        before = now
        if not (before or scheduler.running or scheduler.waiting):
            break
    # Then each has the tokens that it has alone, with the forced ones where they were forced
    assert len(ended) == len(sequences) and any(forced.values())
    shard = scheduler.shards[0]
    assert shard.pages.free == shard.pages.pages and len(shard.slots) == slots
    for sequence in ended:
        for place in range(sequence.prompt, len(sequence.tokens)):
            expected = forced[sequence].get(place, None)
            assert sequence.tokens[place] == (next_token(sequence.tokens[:place])[0] if expected is None else expected)
