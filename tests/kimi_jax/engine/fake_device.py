"""A device for the scheduler's tests: its next token is a hash of all tokens before, as read from pages and states.

Pages, slots and snapshots hold the tokens themselves, so that a page given to two sequences, written while shared, or
found under a wrong key gives another answer, or ends the test at once.
"""

import itertools
import zlib
from array import array
from collections.abc import Iterable, Iterator

from kimi_jax.engine.sequence import Sequence, Step
from kimi_jax.model.context import PAGE

STOP, NOTHING = 0, 65535


def next_token(tokens: list[int], before: int = 0) -> tuple[int, int]:
    """Returns the token after `tokens`, 0 to 399, of which one in four hundred is STOP, and a hash of all of them.

    `before` is the hash of those that are left out.
    """
    total = zlib.crc32(array("H", tokens), before)
    return total % 400, total


def whole_answer(prompt: list[int], ends: int) -> list[int]:
    """Returns what a sequence must become that is computed alone."""
    tokens, (token, total) = list(prompt), next_token(prompt)
    while len(tokens) < ends:
        tokens.append(token)
        if token == STOP:
            break
        token, total = next_token([token], total)
    return tokens


class FakeDevice:
    """Runs steps in order, and returns their tokens when they are read."""

    def __init__(self, recurrent: bool):
        self.recurrent = recurrent
        self.pages: dict[tuple[int, int, int], list[int]] = {}
        self.states: dict[tuple[int, int], list[int]] = {}
        self.snapshots: dict[tuple[int, int], list[int]] = {}
        self.chosen: dict[tuple[int, int], tuple[int, bool]] = {}

    def run(self, step: Step) -> list[tuple[Sequence, list[int], bool]]:
        """Returns each sequence's tokens, and whether they are the last."""
        found = []
        for load in step.loads:
            shard = load.sequence.shard
            self.states[shard, load.sequence.slot] = self.snapshots[shard, load.place]
        for sequence in step.decode:
            at = sequence.shard, sequence.slot
            token, finished = self.chosen[at]
            if finished:
                found.append((sequence, [token], finished))
            else:
                found.append((sequence, *self._verify(sequence, token, step.drafts.get(sequence, ()))))
        alone = len({piece.sequence.shard for piece in step.pieces}) == len(step.pieces)
        for piece in step.pieces:
            sequence = piece.sequence
            assert alone or not sequence.media, "a step with several pieces of a shard carries no embeddings"
            self._compute(sequence, piece.first, sequence.tokens[piece.first : piece.stop])
            if piece.last:
                token, finished = self._choose(sequence, piece.stop)
                self.chosen[sequence.shard, sequence.slot] = token, finished
                found.append((sequence, [token], finished))
        for save in step.saves:
            shard = save.sequence.shard
            self.snapshots[shard, save.place] = list(self.states[shard, save.sequence.slot])
        return found

    def _verify(self, sequence: Sequence, token: int, draft: Iterable[int]) -> tuple[list[int], bool]:
        """Computes a token and what is right of its draft, all of which is written to the pages."""
        first, new = sequence.dispatched - 1, []
        self._write(sequence, first, [token, *draft])
        for guess in (*draft, None):
            self._compute(sequence, first + len(new), [token])
            token, finished = self._choose(sequence, first + len(new) + 1)
            new.append(token)
            if finished or token != guess:
                break
        self.chosen[sequence.shard, sequence.slot] = token, finished
        return new, finished

    def _compute(self, sequence: Sequence, first: int, tokens: list[int]) -> None:
        at = sequence.shard, sequence.slot
        if first == 0:
            self.states[at] = []
        if self.recurrent:
            assert self.states[at] == self._history(sequence, first), "a state of another sequence, or another place"
            self.states[at] = self.states[at] + tokens
        self._write(sequence, first, tokens)

    def _write(self, sequence: Sequence, first: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, first):
            page = sequence.pages[position // PAGE]
            assert page.users == 1, "a shared page is written"
            self.pages.setdefault((sequence.shard, page.part, page.number), [NOTHING] * PAGE)[position % PAGE] = token

    def _history(self, sequence: Sequence, count: int) -> list[int]:
        pages = [self.pages[sequence.shard, page.part, page.number] for page in sequence.pages[: -(-count // PAGE)]]
        return list(itertools.chain.from_iterable(pages))[:count]

    def _choose(self, sequence: Sequence, count: int) -> tuple[int, bool]:
        token, _ = next_token(self._history(sequence, count))
        return token, token == STOP or count + 1 >= sequence.ends


def every_page(sequences: list[Sequence]) -> Iterator[tuple[int, int, int]]:
    """Yields (shard, part, number) of each page of each sequence."""
    for sequence in sequences:
        for page in sequence.pages:
            yield sequence.shard, page.part, page.number
