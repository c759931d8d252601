"""The pages, slots and copies of states of one data shard, and what its sequences take, share and leave of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.engine.pages import Key, Page, PagePool, count_shared, tail_key
from kimi_jax.engine.sequence import Sequence as Running
from kimi_jax.engine.sequence import Snapshot, Status
from kimi_jax.engine.snapshots import SnapshotPool
from kimi_jax.model.context import PAGE


@dataclass
class Shard:
    """The pools of one data shard, its free slots, the one freed longest ago first, and the sequences that run in it.

    left: of free slots with the state of a sequence's end, the key of the sequence's tail: who takes the tail over goes
        on in the slot.
    """

    pages: PagePool
    slots: list[int]
    snapshots: SnapshotPool | None = None  # None in a model without recurrent states
    running: list[Running] = field(default_factory=list)
    left: dict[int, Key] = field(default_factory=dict)

    def hit(self, sequence: Running) -> tuple[list[Page], int]:
        """Returns the pages found for a sequence's tokens, of which one is left to compute at least, and how many of
        them can be used: up to a snapshot where the model has recurrent states."""
        keys = sequence.update_keys()[: sequence.sharable_pages]
        found = self.pages.find(keys)
        return found, self._begin(keys[: len(found)])

    def promise(self, sequence: Running, usable: int, urgency: Callable[[Running], Any]) -> Running | None:
        """Returns the more urgent sequence that is about to compute most of the first pages of another one, None where
        none computes more of them than the `usable` ones."""
        best = None
        if self.snapshots is not None and not self.snapshots.places:
            return None
        for other in self.running:
            if other.status is Status.PREFILL and urgency(other) < urgency(sequence):
                shared = self.shared_pages(sequence, other)
                if shared > usable and shared * PAGE > other.dispatched:
                    usable, best = shared, other
        return best

    def shared_pages(self, sequence: Running, other: Running) -> int:
        """Returns how many pages of another sequence a sequence can share once they are computed."""
        return min(count_shared(sequence.update_keys(), other.keys), sequence.sharable_pages)

    def await_pages(self, sequence: Running, other: Running) -> None:
        """Lets another sequence leave a copy of its state where a waiting one can begin."""
        if self.snapshots is not None:
            other.cuts[self.shared_pages(sequence, other) * PAGE] = True

    def start(self, sequence: Running) -> Snapshot | None:
        """Gives a sequence a slot, and pages for all its tokens, the first of them shared, and one taken over where it
        goes on from another's end. Returns the copy that fills the slot, None where the sequence begins empty or in the
        middle of a page, or has no state."""
        found, usable = self.hit(sequence)
        tail = self._tail(sequence, len(found))
        usable = usable if tail is None else len(found)
        self.pages.share(found[:usable])
        sequence.pages = list(found[:usable])
        sequence.slot, sequence.begin = self.slots[0], usable * PAGE
        if tail is not None:
            page, count, sequence.slot = tail
            self.pages.take_over(page)
            sequence.pages.append(page)
            sequence.begin += count
        for index in range(len(sequence.pages), sequence.needed_pages):
            allocated = self.pages.allocate(index)
            assert allocated is not None
            sequence.pages.append(allocated)
        self.slots.remove(sequence.slot)
        self.left.pop(sequence.slot, None)
        sequence.dispatched = sequence.begin
        sequence.prefill = len(sequence.tokens)
        if sequence.cached is None:
            sequence.cached = sequence.begin
        sequence.status = Status.PREFILL
        self.running.append(sequence)
        if self.snapshots is None:
            return None
        sequence.cuts = self._cuts(sequence, len(found))
        if tail is not None or not usable:
            return None
        return Snapshot(sequence, self.snapshots.use(sequence.keys[usable - 1]))

    def publish(self, sequence: Running) -> None:
        """Lets others find the pages that are full of computed tokens, and the copies at their ends."""
        keys, full = sequence.update_keys(), sequence.full_pages()
        for page, key in zip(sequence.pages[:full], keys, strict=False):
            self.pages.publish(page, key)
        if self.snapshots is not None:
            for end in [end for end in sequence.unpublished if end <= full * PAGE]:
                self.snapshots.publish(keys[end // PAGE - 1], sequence.unpublished.pop(end), guess=True)

    def copy_place(self, sequence: Running) -> Snapshot | None:
        """Returns the copy to make of the state after a sequence's dispatched tokens: at a page boundary that has a
        meaning, that is a guess, or that costs nobody else's copy. In prefill the tokens are known, and others find
        the copy from the next step on; a decoded one waits in `unpublished` until the host has read its tokens."""
        end, snapshots = sequence.dispatched, self.snapshots
        if snapshots is None or end % PAGE:
            return None
        decoded = end > sequence.prefill
        meant, guess = sequence.cuts.get(end, False), end in sequence.cuts or decoded
        if not decoded and snapshots.find(key := sequence.keys[end // PAGE - 1]) is not None:
            if meant:
                snapshots.use(key)
            return None
        if not (meant or guess or snapshots.free) or (place := snapshots.allocate(guess=not meant)) is None:
            return None
        if decoded:
            sequence.unpublished[end] = place
        else:
            snapshots.publish(key, place, guess=not meant)
        return Snapshot(sequence, place)

    def release(self, sequence: Running, *, sound: bool = True, ended: bool = False) -> None:
        """Takes a sequence's slot and pages back. Its tail and the last copy of its states are kept: the sequence may
        come back, or the next turn of its conversation. `sound` is false where its numbers were not finite: nobody is
        to find its pages. `ended` is true where the device ended it, so that steps on their way compute nothing of
        it."""
        if sound:
            self.publish(sequence)
            self._leave(sequence, ended)
        else:
            self.pages.forget(sequence.pages)
        if self.snapshots is not None:
            for place in sequence.unpublished.values():
                self.snapshots.discard(place)
            sequence.unpublished.clear()
            if not sound:
                self.snapshots.forget(sequence.keys)
            elif last := self._begin(sequence.keys[: sequence.full_pages()]):
                self.snapshots.use(sequence.keys[last - 1])
        self.pages.release(sequence.pages)
        self.slots.append(sequence.slot)
        self.running.remove(sequence)
        sequence.pages, sequence.slot = [], -1

    def _leave(self, sequence: Running, ended: bool) -> None:
        """Lets others find the last page of a sequence, if it is full in part, and the state in its slot."""
        full, stop = sequence.full_pages(), sequence.computed
        if stop == full * PAGE:
            return
        keys = sequence.keys[:full]
        key = tail_key(keys, sequence.tokens, stop, sequence.media)
        self.pages.publish_tail(sequence.pages[full], keys, key, stop - full * PAGE)
        if self.snapshots is not None and (ended or sequence.dispatched == stop):
            self.left[sequence.slot] = key

    def _tail(self, sequence: Running, full: int) -> tuple[Page, int, int] | None:
        """Returns a tail that a sequence can go on in after so many full pages, how many tokens it holds, and the slot
        to take: the one with the state after them where the model has states."""
        for page, count in self.pages.find_tail(sequence.keys[:full], sequence.tokens, sequence.media):
            for slot in self.slots:
                if self.snapshots is None or self.left.get(slot) == page.key:
                    return page, count, slot
        return None

    def _begin(self, keys: Sequence[Key]) -> int:
        """Returns after how many of these pages a sequence can begin."""
        usable = len(keys)
        while self.snapshots is not None and usable and self.snapshots.find(keys[usable - 1]) is None:
            usable -= 1
        return usable

    def _cuts(self, sequence: Running, found: int) -> dict[int, bool]:
        """Returns the page boundaries at which to copy states, and whether each has a meaning: the last of the tokens,
        known ones, and the one up to which another sequence's tokens are alike, which is a place where more may
        meet. Where nothing is known of a prompt, every boundary may be such a place: as many as there are places for
        are guesses."""
        assert self.snapshots is not None
        first, last = sequence.dispatched // PAGE, sequence.sharable_pages
        known = (end // PAGE for end in sequence.boundaries or () if end <= len(sequence.tokens))
        cuts = {page * PAGE: True for page in (*known, last, found) if page > first}
        if sequence.boundaries is None and (places := self.snapshots.guessable):
            stride = max(1, -(-(last - first - 1) // places))
            guesses = range(first // stride * stride + stride, last, stride)
            cuts = {page * PAGE: False for page in guesses} | cuts
        return cuts
