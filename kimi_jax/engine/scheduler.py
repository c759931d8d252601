"""Decides what each step computes. Plain Python over lists: no device, no clock, no randomness.

One notion carries prefill, chunks of it, decoding and resuming: a sequence has tokens that are known and tokens that
are computed, and a step brings the second number nearer to the first. Every step decodes all sequences that can, beside
at most `chunk` tokens of prefill a data shard, of one prompt or of several short ones. Pages for a whole prompt are
taken at admission, one page at a time afterwards; where none is left, the least urgent and newest sequence gives up its
pages and waits to be computed again, which the pages that are still found by their keys make short.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kimi_jax.engine.pages import Page, PagePool
from kimi_jax.engine.sequence import Piece, Sequence, Snapshot, Status, Step
from kimi_jax.engine.snapshots import SnapshotPool
from kimi_jax.model.context import PAGE

# Steps of waiting after which a request counts as one priority higher.
AGEING = 256
# Ends of messages at which states are copied: the first ones are of the system prompt and tools, the last of the turn.
FIRST_ENDS, LAST_ENDS = 2, 2


@dataclass
class Shard:
    """The pools of one data shard, and its free slots."""

    pages: PagePool
    slots: list[int]
    snapshots: SnapshotPool | None = None  # None in a model without recurrent states
    running: list[Sequence] = field(default_factory=list)

    def hit(self, sequence: Sequence) -> tuple[list[Page], int]:
        """Returns the pages found for a sequence's tokens, of which one is left to compute at least, and how many of
        them can be used: up to a snapshot where the model has recurrent states."""
        keys = sequence.update_keys()[: (len(sequence.tokens) - 1) // PAGE]
        found = self.pages.find(keys)
        usable = len(found)
        while self.snapshots is not None and usable and self.snapshots.find(keys[usable - 1]) is None:
            usable -= 1
        return found, usable


class Scheduler:
    """`chunk` is the most tokens of a step's prefill of a data shard, `packed` the most sequences that share them."""

    def __init__(self, shards: list[Shard], chunk: int, packed: int = 1):
        self.shards, self.chunk, self.packed = shards, chunk, packed
        self.waiting: list[Sequence] = []
        self.step = 0

    @property
    def running(self) -> list[Sequence]:
        return [sequence for shard in self.shards for sequence in shard.running]

    def add(self, sequence: Sequence) -> None:
        """Takes in a new sequence, which must fit in an empty shard."""
        sequence.arrived = self.step
        self.waiting.append(sequence)

    def plan(self) -> Step:
        """Chooses the next step, and counts it as dispatched; an empty one where nothing can be computed."""
        self.step += 1
        decode = self._grow()
        admitted, loads = self._admit()
        pieces, saves = self._cut_pieces()
        for sequence in decode:
            sequence.dispatched += 1
        step = Step(tuple(admitted), tuple(loads), tuple(decode), tuple(pieces), tuple(saves))
        for sequence in step.choosing:
            sequence.unread += 1
        return step

    def read(self, sequence: Sequence, token: int) -> None:
        """Takes the token that a step chose for a sequence; steps are read in the order in which they were planned."""
        sequence.unread -= 1
        sequence.tokens.append(token)
        if sequence.status is Status.DECODE:
            if sequence.computed % PAGE == 0:
                self._publish(sequence)
        elif sequence.status is Status.LEAVING and not sequence.unread:
            sequence.status = Status.WAITING
            self.waiting.append(sequence)

    def finish(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Ends a sequence, and frees what it has. `sound` is false where its numbers were not finite: nobody is to find
        its pages."""
        shard = self.shards[sequence.shard]
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status in (Status.PREFILL, Status.DECODE):
            if sound:
                self._publish(sequence)
            else:
                shard.pages.forget(sequence.pages)
                if shard.snapshots is not None:
                    shard.snapshots.forget(sequence.keys)
            self._release(sequence)
        sequence.status = Status.DONE

    def has_prefix(self, sequence: Sequence) -> bool:
        """Returns whether all full pages of a sequence's tokens can be used by another one."""
        keys = sequence.update_keys()
        for shard in self.shards:
            usable = len(shard.pages.find(keys)) == len(keys) > 0
            if usable and (shard.snapshots is None or shard.snapshots.find(keys[-1]) is not None):
                return True
        return False

    def urgency(self, sequence: Sequence) -> tuple[int, int]:
        """Orders sequences, the most urgent first: by priority, which rises with age, then by arrival."""
        return -(sequence.priority + (self.step - sequence.arrived) // AGEING), sequence.number

    def _grow(self) -> list[Sequence]:
        """Returns the sequences to decode, each with a page for its next token."""
        decode: list[Sequence] = []
        for shard in self.shards:
            for sequence in sorted(shard.running, key=self.urgency):
                if sequence.status is not Status.DECODE or not sequence.has_more:
                    continue
                while sequence.status is Status.DECODE and sequence.dispatched // PAGE >= len(sequence.pages):
                    if (page := shard.pages.allocate(len(sequence.pages))) is not None:
                        sequence.pages.append(page)
                    else:
                        self._preempt(max(shard.running, key=self.urgency))
                if sequence.status is Status.DECODE:
                    decode.append(sequence)
        return [sequence for sequence in decode if sequence.status is Status.DECODE]

    def _preempt(self, sequence: Sequence) -> None:
        self._publish(sequence)
        self._release(sequence)
        sequence.dispatched = 0
        if sequence.unread:
            sequence.status = Status.LEAVING
        else:
            sequence.status = Status.WAITING
            self.waiting.append(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Lets others find the pages that are full of computed tokens."""
        pool, keys = self.shards[sequence.shard].pages, sequence.update_keys()
        for page, key in zip(sequence.pages[: sequence.full_pages()], keys, strict=False):
            pool.publish(page, key)

    def _release(self, sequence: Sequence) -> None:
        shard = self.shards[sequence.shard]
        shard.pages.release(sequence.pages)
        shard.slots.append(sequence.slot)
        shard.running.remove(sequence)
        sequence.pages, sequence.slot = [], -1

    def _admit(self) -> tuple[list[Sequence], list[Snapshot]]:
        """Gives slots and pages to waiting sequences, the most urgent first; nobody passes one that has no room."""
        admitted: list[Sequence] = []
        loads: list[Snapshot] = []
        for sequence in sorted(self.waiting, key=self.urgency):
            if (number := self._shard_for(sequence)) is None:
                break
            self.waiting.remove(sequence)
            self._start(sequence, number)
            admitted.append(sequence)
            snapshots = self.shards[number].snapshots
            if sequence.dispatched and snapshots is not None:
                loads.append(Snapshot(sequence, snapshots.use(sequence.keys[sequence.dispatched // PAGE - 1])))
        return admitted, loads

    def _shard_for(self, sequence: Sequence) -> int | None:
        """Returns the shard with the longest beginning of a sequence among those with room, the emptiest of equals."""
        best: tuple[int, int, int] | None = None
        for number, shard in enumerate(self.shards):
            found, usable = shard.hit(sequence)
            needed = -(-len(sequence.tokens) // PAGE)
            if shard.slots and shard.pages.has_room(usable, needed, found[:usable]):
                best = max(best or (-1, -1, -1), (usable, shard.pages.free, -number))
        return None if best is None else -best[2]

    def _start(self, sequence: Sequence, number: int) -> None:
        shard = self.shards[number]
        found, usable = shard.hit(sequence)
        shard.pages.share(found[:usable])
        sequence.pages = list(found[:usable])
        for index in range(usable, -(-len(sequence.tokens) // PAGE)):
            page = shard.pages.allocate(index)
            assert page is not None
            sequence.pages.append(page)
        sequence.shard, sequence.slot = number, shard.slots.pop()
        sequence.dispatched, sequence.prefill = usable * PAGE, len(sequence.tokens)
        if sequence.cached is None:
            sequence.cached = sequence.dispatched
        sequence.cuts = [] if shard.snapshots is None else self._cuts(sequence, len(found))
        sequence.status = Status.PREFILL
        shard.running.append(sequence)

    def _cuts(self, sequence: Sequence, found: int) -> list[int]:
        """Returns the page boundaries, ascending, at which to copy states: the last of the tokens, ends of messages,
        and the one up to which another sequence's tokens are alike, which is a place where more may meet."""
        ends = sorted({end // PAGE * PAGE for end in sequence.boundaries if end <= len(sequence.tokens)})
        wanted = {*ends[:FIRST_ENDS], *ends[-LAST_ENDS:], (len(sequence.tokens) - 1) // PAGE * PAGE, found * PAGE}
        return sorted(cut for cut in wanted if cut > sequence.dispatched)

    def _cut_pieces(self) -> tuple[list[Piece], list[Snapshot]]:
        """Returns the next pieces of prefill of each shard, and the states to copy at their ends.

        A sequence with media has a step's prefill to itself: its pictures' embeddings go with the step.
        """
        pieces: list[Piece] = []
        saves: list[Snapshot] = []
        for shard in self.shards:
            prefilling = [sequence for sequence in shard.running if sequence.status is Status.PREFILL]
            prefilling = sorted(prefilling, key=self.urgency)[: self.packed]
            if any(sequence.media for sequence in prefilling):
                prefilling = prefilling[:1]
            room = self.chunk
            for sequence in prefilling:
                if not room:
                    break
                pieces.append(self._cut_piece(sequence, room))
                room -= pieces[-1].stop - pieces[-1].first
                if (place := self._snapshot_place(shard, sequence)) is not None:
                    saves.append(Snapshot(sequence, place))
        return pieces, saves

    def _cut_piece(self, sequence: Sequence, room: int) -> Piece:
        first = sequence.dispatched
        stop = min(first + room, sequence.prefill, *(cut for cut in sequence.cuts if cut > first))
        sequence.dispatched = stop
        self._publish(sequence)
        if stop == sequence.prefill:
            sequence.status = Status.DECODE
        return Piece(sequence, first, stop, stop == sequence.prefill)

    def _snapshot_place(self, shard: Shard, sequence: Sequence) -> int | None:
        """Returns the place for a copy of the state at a piece's end: where one is wanted, or costs nobody else's."""
        end, snapshots = sequence.dispatched, shard.snapshots
        if snapshots is None or end % PAGE or not (end in sequence.cuts or snapshots.free):
            return None
        return snapshots.add(sequence.keys[end // PAGE - 1])


def message_ends(tokens: Iterable[int], ends: frozenset[int]) -> tuple[int, ...]:
    """Returns the positions just after each token that ends a message, which a model's stop ids do."""
    return tuple(position + 1 for position, token in enumerate(tokens) if token in ends)
