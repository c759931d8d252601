"""Proposes tokens that a sequence may go on with, for a verification step to check (`runtime.verify`).

A drafter may be wrong as often as it likes: answers are the same. It must be deterministic (`verify` says why).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from kimi_jax.model.eagle import EagleHead
from kimi_jax.runtime.batch import MOST_VERIFIED

# Drafts of a sequence at a time, unless another number is given: acceptance falls with each further one.
DRAFT_TOKENS = 4


def check_draft_tokens(count: int) -> None:
    """Raises ValueError for a number of drafts that no verification takes."""
    if not 1 <= count < MOST_VERIFIED:
        raise ValueError(f"draft_tokens is {count}, expected 1 to {MOST_VERIFIED - 1}")


@runtime_checkable
class Drafter(Protocol):
    """Drafts for one sequence, whose tokens only become more."""

    def propose(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        """Returns at most `count` tokens that may follow `tokens`, the sequence's prompt and answer so far."""
        ...


# What `draft=` takes: makes a drafter for each sequence, or is a head that drafts for all of them on the device.
Draft = Callable[[], Drafter] | EagleHead


@dataclasses.dataclass
class DraftCounts:
    """Counts what was drafted: `drafts`, each of some `tokens` after one sequence's, that a step verified, and how many
    of their tokens were `accepted`."""

    drafts: int = 0
    tokens: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """The share of drafted tokens that were accepted, 0 where there were none."""
        return self.accepted / max(self.tokens, 1)

    @property
    def length(self) -> float:
        """The mean number of tokens that were accepted of a draft, 0 where there was none."""
        return self.accepted / max(self.drafts, 1)


# The fewest tokens that have to recur: two recur by chance in most texts.
SHORTEST = 3
# Earlier places that are compared for the longest: of a frequent run of tokens, the newest are as good as any.
PLACES = 8


class PromptLookup:
    """Drafts what followed the last tokens where they occurred before, in the prompt or the answer, as answers do that
    repeat parts of a file. Of several such places it takes the one that is alike for longest, and of equals the newest.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._seen = 0  # tokens of which the places are known

    def propose(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        """Returns at most `count` tokens that followed an earlier occurrence of the last ones, () where there is none.

        Takes time for the tokens that are new since the last call.
        """
        for end in range(max(self._seen + 1, SHORTEST), len(tokens)):  # (the last tokens are no earlier place)
            self._places.setdefault(tuple(tokens[end - SHORTEST : end]), []).append(end)
        self._seen = max(self._seen, len(tokens) - 1)
        if len(tokens) < SHORTEST:
            return ()
        best, longest = None, 0
        for end in reversed(self._places.get(tuple(tokens[-SHORTEST:]), [])[-PLACES:]):
            alike = SHORTEST
            while alike < min(end, 64) and tokens[end - alike - 1] == tokens[-alike - 1]:
                alike += 1
            if alike > longest:
                best, longest = end, alike
        return () if best is None else tuple(tokens[best : best + count])
