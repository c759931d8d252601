"""Ends the content of an answer before a stop string. Reasoning and calls of tools may hold the same text."""

from collections.abc import Iterable

from kimi_jax.text.answers import Delta


class StopText:
    """Passes deltas on, and holds back content that may be the beginning of a stop string.

    `found` is the stop string at which the content ended, None while there is none.
    """

    def __init__(self, strings: tuple[str, ...]):
        self.strings = strings
        self.found: str | None = None
        self._held = ""

    def filter(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Returns the deltas that are certain to be part of the answer; after `found`, none but the last."""
        kept: list[Delta] = []
        for delta in deltas:
            if self.found is not None:
                break
            if delta.content is None:
                kept += self._rest()
                kept.append(delta)
                continue
            self._held += delta.content
            places = [(place, string) for string in self.strings if (place := self._held.find(string)) >= 0]
            if places:
                end, self.found = min(places)
            else:
                end = len(self._held) - self._begun()
            if end:
                kept.append(Delta(content=self._held[:end]))
            self._held = self._held[end:]
        return kept

    def _rest(self) -> list[Delta]:
        held, self._held = self._held, ""
        return [Delta(content=held)] if held else []

    def _begun(self) -> int:
        """Returns the length of the longest end of the text that a stop string begins with."""
        longest = min(max(map(len, self.strings)) - 1, len(self._held))
        ends = (self._held[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(string.startswith(end) for string in self.strings)), 0)
