"""Any requests in any order: no page is lost or owned twice, every request ends, each with the tokens it has alone."""

from collections import Counter
from random import Random

import fake_device
import pytest
from fake_device import FakeDevice, every_page, whole_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.engine.job import message_ends
from kimi_jax.engine.pages import PagePool, Placeholders, extend_keys, tail_key
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
    """A scheduler and its device, read one step behind, as the engine does it, which drafts by `guess`es if any."""

    def __init__(self, scheduler, guess=None):
        self.guess = guess
        self.scheduler, self.device = scheduler, FakeDevice(scheduler.shards[0].snapshots is not None)
        self.before, self.ended = [], []

    def step(self):
        step = self.scheduler.plan()
        now = self.device.run(step)
        self.check()
        for sequence, tokens, finished in self.before:
            if sequence.status is not Status.DONE:
                self.scheduler.read(sequence, *tokens)
                if finished:
                    self.scheduler.finish(sequence, ended=True)
                    self.ended.append(sequence)
                elif self.guess is not None and sequence.status is Status.DECODE:
                    sequence.draft = self.draft(sequence.tokens)
        self.before = now
        return step

    def draft(self, tokens):
        """Returns up to four of the next tokens, of which one may be wrong."""
        count, wrong = self.guess.choice([0, 0, 1, 4]), self.guess.randrange(8)
        answer = whole_answer(tokens, len(tokens) + count)[len(tokens) :]
        return tuple(39 if number == wrong else token for number, token in enumerate(answer))

    def check(self):
        """Asserts that a page is free or owned as often as it counts users, and a slot free or of one sequence."""
        for number, shard in enumerate(self.scheduler.shards):
            owned = Counter(every_page(shard.running))
            users = {(number, page.part, page.number): page.users for s in shard.running for page in s.pages}
            assert owned == users and len(owned) + shard.pages.free == shard.pages.pages
            slots = [sequence.slot for sequence in shard.running] + shard.slots
            assert len(slots) == len(set(slots)) and -1 not in slots
            if (snapshots := shard.snapshots) is not None:
                waiting = [place for sequence in shard.running for place in sequence.unpublished.values()]
                assert snapshots.free + snapshots.copies + len(waiting) == snapshots.places

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


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(1, 1, None), (1, 1, 5), (2, 2, 2), (1, 3, None), (2, 1, 0)]),
    st.booleans(),
)
def test_any_requests_in_any_order(seed, shape, drafts):
    random, (shards, parts, places) = Random(seed), shape
    scheduler = make_scheduler(9 if parts == 1 else 4, 3, shards, parts, places, packed=random.choice([1, 2]))
    run, asked, cancelled = Run(scheduler, Random(seed) if drafts else None), [], set()
    room = (9 if parts == 1 else 4 * parts) * PAGE
    for number in range(14):
        length = random.choice([1, 5, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 300, 420])
        new = random.choice([1, 2, 40, 150, 150, random.choice([300, room - length])])
        prefix = random.choice([0, 0, length // 2, length])
        asked.append(sequence(number, length, min(new, room - length), prefix, random.randrange(3)))
        asked[-1].boundaries = random.choice([None, (), (length // 2,)])
        if length > 8 and random.random() < 0.2:
            asked[-1].media = (Placeholders(4, 8, random.choice([b"a", b"b"])),)
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
        assert shard.snapshots is None or shard.snapshots.free + shard.snapshots.copies == places
    assert len(run.ended) + len(cancelled) == 14
    for one in run.ended:
        assert one.tokens == whole_answer(one.tokens[: one.prompt], one.ends)


def test_a_picture_in_one_shard_keeps_every_shard_to_one_piece():
    """The second of four prompts over two shards has a picture: its step has a piece of each shard, and no other."""
    run = Run(make_scheduler(pages=20, slots=2, shards=2, packed=2))
    prompts = [sequence(number, 40 + number, 2) for number in range(4)]
    prompts[1].media = (Placeholders(4, 8, b"a"),)
    for prompt in prompts:
        run.scheduler.add(prompt)
    pieces = run.step().pieces
    assert [piece.sequence for piece in pieces] == prompts[:2] and prompts[0].shard != prompts[1].shard
    run.until_idle()
    assert len(run.ended) == 4


@pytest.mark.parametrize("places", [None, 24])
@pytest.mark.parametrize("boundaries", [(1500,), None])
def test_a_prefix_is_computed_once(places, boundaries):
    """1,500 shared tokens, 700 of each: from the second on all 11 full pages of the prefix are found, whether or not it
    is known where the texts part, however many prompts come."""
    run = Run(make_scheduler(pages=60, slots=2, places=places))
    for number in range(20):
        run.scheduler.add(one := sequence(number, 2200, 3, prefix=1500))
        one.boundaries = boundaries
        run.until_idle()
        assert one.cached == (0 if number == 0 else 11 * PAGE)
        assert one.tokens == whole_answer(one.tokens[:2200], one.ends)


def test_where_prefixes_part_a_state_is_copied():
    """With wrong boundaries the second request finds where texts part, and copies there; the third begins there."""
    run, found = Run(make_scheduler(pages=60, slots=2, places=4)), []
    for number in range(3):
        run.scheduler.add(one := sequence(number, 700, 2, prefix=3 * PAGE + 5))
        run.until_idle()
        found.append(one.cached)
    assert found == [0, 2 * PAGE, 3 * PAGE]  # (two pages: the end of the first piece)


def test_guesses_take_no_place_of_a_copy_that_was_used():
    run = Run(make_scheduler(pages=60, slots=2, places=8))
    for number in range(2):
        run.scheduler.add(sequence(number, 700, 2, prefix=2 * PAGE))
        run.until_idle()
    for number in range(2, 4):
        run.scheduler.add(one := sequence(number, 1500, 2))
        one.boundaries = None
        run.until_idle()
    run.scheduler.add(again := sequence(4, 700, 2, prefix=2 * PAGE))
    run.until_idle()
    assert again.cached == 2 * PAGE


@pytest.mark.parametrize("places", [None, 8])
def test_requests_alike_at_once_are_prefilled_once(places):
    """Eight answers of one prompt, and three other prompts with its first half, all in one step."""
    run = Run(make_scheduler(pages=120, slots=11, places=places))
    alike = [sequence(0, 900, 3) for _ in range(8)]
    halves = [sequence(number, 900, 3) for number in range(1, 4)]
    for number, one in enumerate(alike + halves):
        one.number = number
        one.tokens[:450] = alike[0].tokens[:450]
        run.scheduler.add(one)
    computed = 0
    while not (step := run.step()).empty or run.scheduler.waiting:
        computed += sum(piece.stop - piece.first for piece in step.pieces)
    run.until_idle()
    assert [one.cached for one in alike] == [0] + [7 * PAGE] * 7
    assert [one.cached for one in halves] == [3 * PAGE] * 3
    assert computed == 900 + 7 * (900 - 7 * PAGE) + 3 * (900 - 3 * PAGE)
    for one in alike + halves:
        assert one.tokens == whole_answer(one.tokens[:900], one.ends)


def test_who_waits_for_a_prefix_keeps_its_slot_and_waits_for_nobody_less_urgent():
    run = Run(make_scheduler(pages=60, slots=2))
    first, second, other = (sequence(number % 2, 900, 1) for number in (0, 2, 1))
    second.number, other.number = 1, 2
    for one in (first, second, other):
        run.scheduler.add(one)
    run.step()
    assert (first.status, second.status, other.status) == (Status.PREFILL, Status.WAITING, Status.WAITING)
    run.scheduler.add(urgent := sequence(4, 900, 1, priority=1))
    urgent.tokens[:] = first.tokens
    run.step()
    assert urgent.status is Status.PREFILL and urgent.cached == 2 * PAGE
    run.until_idle()
    assert second.cached == 7 * PAGE


def test_a_prefix_that_is_being_computed_counts_for_the_choice_of_a_shard():
    run = Run(make_scheduler(pages=30, slots=2, shards=2))
    alike = [sequence(0, 900, 1) for _ in range(3)]
    for number, one in enumerate(alike):
        one.number = number
        run.scheduler.add(one)
    run.until_idle()
    # (the third does not wait for a slot in the first shard)
    assert [one.shard for one in alike] == [0, 0, 1] and [one.cached for one in alike] == [0, 7 * PAGE, 0]


def test_nobody_waits_for_a_state_that_was_passed_without_a_copy():
    run = Run(make_scheduler(pages=60, slots=2, places=8))
    first, second = sequence(0, 900, 1), sequence(1, 900, 1)
    second.tokens[: 3 * PAGE] = first.tokens[: 3 * PAGE]
    run.scheduler.add(first)
    run.step()
    run.step()
    run.scheduler.add(second)
    run.step()
    assert first.status is second.status is Status.PREFILL and second.cached == 2 * PAGE
    run = Run(make_scheduler(pages=60, slots=2, places=0))
    for number in range(2):
        run.scheduler.add(Sequence(list(first.tokens), 901, number))
    run.step()
    assert len(run.scheduler.running) == 2


def test_the_one_that_others_wait_for_may_be_cancelled():
    run = Run(make_scheduler(pages=60, slots=4, places=6))
    alike = [sequence(0, 900, 3) for _ in range(4)]
    for number, one in enumerate(alike):
        one.number = number
        run.scheduler.add(one)
    run.step()
    run.scheduler.finish(alike[0])
    run.until_idle()
    assert [one.cached for one in alike] == [0, 2 * PAGE, 7 * PAGE, 7 * PAGE]
    assert len(run.ended) == 3


@pytest.mark.parametrize("places", [None, 12])
def test_the_next_turn_begins_where_the_last_one_ended(places, monkeypatch):
    """Its last token was chosen and never computed. In a model with states others take its slot but once."""
    monkeypatch.setattr(fake_device, "STOP", -1)
    run, turn = Run(make_scheduler(pages=60, slots=2, places=places)), sequence(0, 200, 400)
    run.scheduler.add(turn)
    run.until_idle()
    for number in range(4):
        end = len(turn.tokens) - 1
        if number == 3:
            for other in (50, 51):
                run.scheduler.add(sequence(other, 40, 2))
            run.until_idle()
        turns = [Sequence([*turn.tokens, *range(one, 40)], end + 330, 10 * number + one) for one in (1, 2)]
        for one in turns:
            run.scheduler.add(one)
        run.until_idle()
        # Only one of two next turns goes on in the page, the other one at its beginning
        page = end // PAGE * PAGE
        assert [one.cached for one in turns] == [end if places is None or number < 3 else page, page]
        for one in turns:
            assert one.tokens == whole_answer(one.tokens[: one.prompt], one.ends)
        turn = turns[0]


def test_the_state_of_an_answer_that_was_cut_off_while_a_step_was_on_its_way_is_not_gone_on_from(monkeypatch):
    monkeypatch.setattr(fake_device, "STOP", -1)
    for places, on_its_way in ((None, 0), (4, 1)):
        run, turn = Run(make_scheduler(pages=60, slots=2, places=places)), sequence(0, 200, 400)
        run.scheduler.add(turn)
        while len(turn.tokens) < 300:
            run.step()
        assert turn.dispatched == len(turn.tokens)
        run.scheduler.finish(turn)
        run.scheduler.add(after := Sequence([*turn.tokens, *range(1, 41)], 400, 1))
        run.until_idle()
        assert after.cached == (2 * PAGE if on_its_way else 299)
        assert after.tokens == whole_answer(after.tokens[: after.prompt], after.ends)


def test_tails_are_told_apart_by_their_pictures_and_evicted_like_others():
    pool = PagePool(2)
    for content in (b"a", b"b"):
        page, media = pool.allocate(0), [Placeholders(3, 9, content)]
        pool.publish_tail(page, [], tail_key([], [7] * 20, 20, media), 20)
        pool.release([page])
    assert pool.free == 2
    for content, found in ((b"a", 1), (b"b", 1), (b"c", 0)):
        media = [Placeholders(3, 9, content)]
        assert len(list(pool.find_tail([], [7] * 21, media))) == found
        assert not list(pool.find_tail([], [7] * 20, media)) and not list(pool.find_tail([], [7] * 19 + [8, 8], media))
    assert pool.allocate(0) is not None and not list(pool.find_tail([], [7] * 21, [Placeholders(3, 9, b"a")]))
    ((page, count),) = pool.find_tail([], [7] * 21, [Placeholders(3, 9, b"b")])
    pool.take_over(page)
    assert (count, page.users, page.key, pool.free) == (20, 1, None, 0) and pool.allocate(0) is None


def test_the_last_copy_of_an_answer_outlives_guesses(monkeypatch):
    monkeypatch.setattr(fake_device, "STOP", -1)
    run, turn = Run(make_scheduler(pages=60, slots=2, places=8)), sequence(0, 200, 200)
    run.scheduler.add(turn)
    run.until_idle()
    for number in (1, 2):
        run.scheduler.add(other := sequence(number, 1500, 2))
        other.boundaries = None
        run.until_idle()
    run.scheduler.add(after := Sequence([*turn.tokens, *range(1, 41)], 500, 3))
    run.until_idle()
    assert after.cached == 3 * PAGE


def test_kept_copies_leave_places_to_guesses():
    run = Run(make_scheduler(pages=60, slots=2, places=8))
    for number in range(10):
        run.scheduler.add(sequence(number, 300, 2))
        run.until_idle()
    for number, cached in ((10, 0), (11, PAGE)):
        run.scheduler.add(one := sequence(number, 500, 2, prefix=PAGE + 5))
        one.boundaries = None
        run.until_idle()
        assert one.cached == cached


def test_answers_alike_share_one_copy(monkeypatch):
    monkeypatch.setattr(fake_device, "STOP", -1)
    run, alike = Run(make_scheduler(pages=60, slots=2, places=8)), [sequence(0, 200, 200) for _ in range(2)]
    for number, one in enumerate(alike):
        one.number = number
        run.scheduler.add(one)
    run.until_idle()  # (which asserts that no place is lost)
    assert alike[0].tokens == alike[1].tokens == whole_answer(alike[0].tokens[:200], 400)
    assert run.scheduler.shards[0].snapshots.copies == 3


def test_the_state_of_an_answer_that_stopped_on_a_page_boundary_is_no_copy(monkeypatch):
    """The step that was sent before the stop was read computes nothing, and what it would have copied is another state:
    the turns after, of which the first computes that page, begin elsewhere."""
    monkeypatch.setattr(fake_device, "STOP", -1)
    run, prompt = Run(make_scheduler(pages=60, slots=2, places=8)), sequence(0, 250, 0).tokens
    *_, stop = whole_answer(prompt, 2 * PAGE)
    monkeypatch.setattr(fake_device, "STOP", stop)
    assert len(whole_answer(prompt, 300)) == 2 * PAGE
    tokens = list(prompt)
    for number, cached in enumerate((0, PAGE, 2 * PAGE)):
        run.scheduler.shards[0].left.clear()  # as where others took the slot
        run.scheduler.add(one := Sequence(list(tokens), len(tokens) + 20, number))
        run.until_idle()
        assert one.cached == cached and one.tokens == whole_answer(tokens, one.ends)
        tokens = [*one.tokens, 41 + number]


def test_a_preempted_answer_goes_on_at_its_last_page(monkeypatch):
    """Two answers outgrow seven pages; the later one is preempted, and computes less than a page again."""
    monkeypatch.setattr(fake_device, "STOP", -1)
    run = Run(make_scheduler(pages=7, slots=2, places=4))
    answers = [Sequence([1 + (i + n) % 40 for i in range(2 * PAGE + 3)], 5 * PAGE, n) for n in range(2)]
    for one in answers:
        run.scheduler.add(one)
    again = []
    for _ in range(3000):
        again += [piece for piece in run.step().pieces if piece.first and piece.stop > 2 * PAGE + 3]
        if not (run.before or run.scheduler.running or run.scheduler.waiting):
            break
    assert again and all(piece.stop - piece.first <= PAGE for piece in again)
    for one in answers:
        assert one.tokens == whole_answer(one.tokens[: one.prompt], one.ends)


def test_known_beginnings_are_the_first_and_last_messages():
    """Between two page boundaries the last of several ends counts, and before the first boundary none does."""
    tokens = [1] * 1000
    for place in (50, 200, 220, 300, 450, 600, 650, 700, 990):
        tokens[place] = 0
    assert message_ends(tokens, (0, 9)) == (221, 301, 701, 991)
    assert message_ends(tokens[:250], (0,)) == (221,) and message_ends(tokens[:100], (0,)) == ()


def test_every_known_beginning_is_copied():
    run = Run(make_scheduler(pages=60, slots=2, places=8))
    run.scheduler.add(one := sequence(0, 1200, 1))
    one.boundaries = (150, 450, 700, 950)
    run.until_idle()
    for number, length in enumerate((150, 450, 700, 950), 1):
        run.scheduler.add(other := Sequence([*one.tokens[:length], *range(50)], length + 60, number))
        run.until_idle()
        assert other.cached == length // PAGE * PAGE


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
