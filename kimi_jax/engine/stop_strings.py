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
        self.strings, self.decoder = strings, decoder
        self.stopped = False
        self._text = ""  # since the first token held back
        self._held: deque[tuple[int, int]] = deque()  # tokens, and where the text of each ends in `_text`

    def push(self, token: int) -> tuple[int, ...]:
        """Returns the tokens whose text ends before any stop string, begun or whole; sets `stopped` at a whole one."""
        self._text += self.decoder.push([token])
        self._held.append((token, len(self._text)))
        found = [place for string in self.strings if (place := self._text.find(string)) >= 0]
        self.stopped = bool(found)
        return self._release(min(found) if found else len(self._text) - self._begun())

    def rest(self) -> tuple[int, ...]:
        """Returns the tokens held back, when the answer has ended otherwise."""
        return self._release(len(self._text))

    def _begun(self) -> int:
        """Returns the length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self.strings)) - 1
        ends = (self._text[-length:] for length in range(min(longest, len(self._text)), 0, -1))
        return next((len(end) for end in ends if any(string.startswith(end) for string in self.strings)), 0)

    def _release(self, end: int) -> tuple[int, ...]:
        released, cut = [], 0
        while self._held and self._held[0][1] <= end:
            token, cut = self._held.popleft()
            released.append(token)
        self._text = self._text[cut:]
        self._held = deque((token, place - cut) for token, place in self._held)
        return tuple(released)


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
