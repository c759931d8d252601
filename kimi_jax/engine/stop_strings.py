"""Ends an answer where its text holds a stop string, and holds back tokens that may be the beginning of one."""

from collections import deque
from typing import Protocol, runtime_checkable

MOST, LONGEST = 16, 1_000  # stop strings of a request, and characters of one


@runtime_checkable
class Decoder(Protocol):
    """Makes text of ids as they come: `kimi_jax.text.StreamDecoder`."""

    def push(self, ids: list[int], /) -> str: ...


class StopStrings:
    """`push` takes tokens one after another, and returns those that are certain to be part of the answer."""

    def __init__(self, strings: tuple[str, ...], decoder: Decoder):
        self.decoder = decoder
        self.stopped = False
        self._matches = [_Match(string) for string in strings]
        self._length = 0  # characters of the text so far
        self._held: deque[tuple[int, int]] = deque()  # tokens, and where the text of each ends

    def push(self, token: int) -> tuple[int, ...]:
        """Returns the tokens whose text ends before any stop string, begun or whole; sets `stopped` at a whole one."""
        piece = self.decoder.push([token])
        before, self._length = self._length, self._length + len(piece)
        self._held.append((token, self._length))
        begun, found = 0, None
        for match in self._matches:
            end = match.feed(piece)
            if end is not None:
                start = before + end - len(match.string)
                found = start if found is None else min(found, start)
            begun = max(begun, match.matched)
        self.stopped = found is not None
        return self._release(self._length - begun if found is None else found)

    def rest(self) -> tuple[int, ...]:
        """Returns the tokens held back, when the answer has ended otherwise."""
        return self._release(self._length)

    def _release(self, end: int) -> tuple[int, ...]:
        released = []
        while self._held and self._held[0][1] <= end:
            released.append(self._held.popleft()[0])
        return tuple(released)


class _Match:
    """Finds a string in text that comes in pieces, and reads each character once (Knuth, Morris and Pratt, 1977).

    matched: how many characters of the string's beginning the text ends with.
    """

    def __init__(self, string: str):
        self.string, self.matched = string, 0
        # For each beginning of the string, the longest shorter one that it ends with
        self._shorter = [0] * (len(string) + 1)
        shorter = 0
        for length in range(2, len(string) + 1):
            shorter = self._extend(shorter, string[length - 1])
            self._shorter[length] = shorter

    def feed(self, piece: str) -> int | None:
        """Returns where in a piece of text the string first ends, None where it does not."""
        matched, index = self.matched, 0
        while index < len(piece):
            if not matched and (index := piece.find(self.string[0], index)) < 0:
                break
            matched, index = self._extend(matched, piece[index]), index + 1
            if matched == len(self.string):
                break
        self.matched = matched
        return index if matched == len(self.string) else None

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.string[matched] == character)


def check_stop_strings(strings: object) -> tuple[str, ...]:
    """Returns the stop strings of a request. Raises ValueError for anything but a few texts of bounded length."""
    if not isinstance(strings, list | tuple) or not all(isinstance(one, str) for one in strings):
        raise ValueError("stop_strings is no list of texts")
    if len(strings) > MOST:
        raise ValueError(f"{len(strings)} stop_strings, expected at most {MOST}")
    for one in strings:
        if not 0 < len(one) <= LONGEST:
            raise ValueError(f"a stop string has {len(one):,} characters, expected 1 to {LONGEST:,}")
    return tuple(strings)
