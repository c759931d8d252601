"""Decides what each step computes. Plain Python over lists: no device, no clock, no randomness.

One notion carries prefill, chunks of it, decoding and resuming: a sequence has tokens that are known and tokens that
are computed, and a step brings the second number nearer to the first. Every step decodes all sequences that can, beside
at most `chunk` tokens of prefill a data shard, of one prompt or of several short ones. Pages for a whole prompt are
taken at admission, one page at a time afterwards; where none is left, the least urgent and newest sequence gives up its
pages and waits to be computed again, which the pages that are still found by their keys make short.
"""

from collections import Counter

from kimi_jax.engine.sequence import Piece, Sequence, Snapshot, Status, Step
from kimi_jax.engine.shard import Shard
from kimi_jax.model.context import PAGE

# Steps of waiting after which a request counts as one priority higher.
AGEING = 256


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
        pieces = self._cut_pieces()
        drafts = {sequence: draft for sequence in decode if (draft := _usable_draft(sequence))}
        for sequence in decode:
            sequence.dispatched += 1
        moved = (*decode, *(piece.sequence for piece in pieces))
        saves = [save for one in moved if (save := self.shards[one.shard].copy_place(one)) is not None]
        step = Step(tuple(admitted), tuple(loads), tuple(decode), drafts, tuple(pieces), tuple(saves))
        for sequence in step.choosing:
            sequence.unread += 1
        return step

    def read(self, sequence: Sequence, *tokens: int) -> None:
        """Takes the tokens that a step chose for a sequence, several where drafts were right; steps are read in the
        order in which they were planned."""
        sequence.unread -= 1
        sequence.tokens += tokens
        if sequence.status is Status.DECODE:
            sequence.dispatched += len(tokens) - 1
            if sequence.computed % PAGE == 0:
                self.shards[sequence.shard].publish(sequence)
        elif sequence.status is Status.LEAVING and not sequence.unread:
            sequence.status = Status.WAITING
            self.waiting.append(sequence)

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """Takes tokens that a sequence, all of whose steps are read, goes on with: a piece of prefill computes them."""
        sequence.tokens += tokens
        if sequence.status is not Status.DECODE:
            return
        pool = self.shards[sequence.shard].pages
        while len(sequence.pages) * PAGE < len(sequence.tokens):
            if (page := pool.allocate(len(sequence.pages))) is None:
                self._preempt(sequence)
                return
            sequence.pages.append(page)
        sequence.prefill, sequence.cuts, sequence.status = len(sequence.tokens), {}, Status.PREFILL

    def finish(self, sequence: Sequence, *, sound: bool = True, ended: bool = False) -> None:
        """Ends a sequence, and frees what it has. `sound` is false where its numbers were not finite: nobody is to find
        its pages. `ended` is true where the device ended it, so that steps on their way compute nothing of it."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status in (Status.PREFILL, Status.DECODE):
            self.shards[sequence.shard].release(sequence, sound=sound, ended=ended)
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
                if sequence.unread and (sequence.stepwise or sequence.draft):
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
        self.shards[sequence.shard].release(sequence)
        sequence.dispatched, sequence.draft = 0, ()
        if sequence.unread:
            sequence.status = Status.LEAVING
        else:
            sequence.status = Status.WAITING
            self.waiting.append(sequence)

    def _admit(self) -> tuple[list[Sequence], list[Snapshot]]:
        """Gives slots and pages to waiting sequences, the most urgent first; nobody passes one that has no room.

        A sequence whose first pages a more urgent one is about to compute waits for them, and a slot for it stays
        free. It waits for nobody less urgent, so that it comes no later than it would behind all that.
        """
        admitted: list[Sequence] = []
        loads: list[Snapshot] = []
        reserved: Counter[int] = Counter()
        if not any(shard.slots for shard in self.shards):
            return admitted, loads
        for sequence in sorted(self.waiting, key=self.urgency):
            if (found := self._shard_for(sequence, reserved)) is None:
                break
            number, promised = found
            shard = self.shards[number]
            if promised is not None:
                reserved[number] += 1
                shard.await_pages(sequence, promised)
                continue
            self.waiting.remove(sequence)
            sequence.shard = number
            if (load := shard.start(sequence)) is not None:
                loads.append(load)
            admitted.append(sequence)
        return admitted, loads

    def _shard_for(self, sequence: Sequence, reserved: Counter[int]) -> tuple[int, Sequence | None] | None:
        """Returns the shard that has, or will have, most of the beginning of a sequence, among those with room, the
        emptiest of equals; and the sequence there that is about to compute more of it than there is now."""
        best: tuple[int, int, int] | None = None
        awaited: dict[int, Sequence] = {}
        for number, shard in enumerate(self.shards):
            if len(shard.slots) <= reserved[number]:
                continue
            found, usable = shard.hit(sequence)
            if not shard.pages.has_room(usable, sequence.needed_pages, found[:usable]):
                continue
            if (promise := shard.promise(sequence, usable, self.urgency)) is not None:
                awaited[number] = promise
                usable = shard.shared_pages(sequence, promise)
            best = max(best or (-1, -1, -1), (usable, shard.pages.free, -number))
        return None if best is None else (-best[2], awaited.get(-best[2]))

    def _cut_pieces(self) -> list[Piece]:
        """Returns the next pieces of prefill of each shard.

        Pictures' embeddings go with a step that has one piece of each shard: where one of the next sequences has media,
        in whatever shard, no shard has more.
        """
        pieces: list[Piece] = []
        queues = [[item for item in shard.running if item.status is Status.PREFILL] for shard in self.shards]
        queues = [sorted(queue, key=self.urgency)[: self.packed] for queue in queues]
        if any(sequence.media for queue in queues for sequence in queue):
            queues = [queue[:1] for queue in queues]
        for queue in queues:
            room = self.chunk
            for sequence in queue:
                if not room:
                    break
                pieces.append(self._cut_piece(sequence, room))
                room -= pieces[-1].stop - pieces[-1].first
        return pieces

    def _cut_piece(self, sequence: Sequence, room: int) -> Piece:
        first = sequence.dispatched
        stop = min(first + room, sequence.prefill, *(cut for cut in sequence.cuts if cut > first))
        sequence.dispatched = stop
        self.shards[sequence.shard].publish(sequence)
        if stop == sequence.prefill:
            sequence.status = Status.DECODE
        return Piece(sequence, first, stop, stop == sequence.prefill)


def _usable_draft(sequence: Sequence) -> tuple[int, ...]:
    """Returns those of a sequence's drafts that its next step verifies: with all of them it is neither full nor at the
    end of a page, where its state may have to be copied, and is computed by a step without drafts."""
    first = sequence.dispatched
    return sequence.draft[: max(0, min(PAGE - 2 - first % PAGE, sequence.ends - 2 - first))]
