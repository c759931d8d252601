"""Counts of an engine."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of the moment. Pages that no sequence uses are free, whether or not they are kept for their content.

    `drafts` counts from the engine's beginning the drafts that were verified, each of some tokens after one sequence's
    last, `drafted_tokens` their tokens, and `accepted_tokens` those that were right; `acceptance_rate` is the share of
    right ones, and `accepted_length` their mean number in a draft.
    """

    compiled_programs: int
    pages: int
    free_pages: int
    slots: int
    free_slots: int
    waiting: int
    running: int
    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_rate: float
    accepted_length: float
