"""Counts of an engine."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of the moment. Pages that no sequence uses are free, whether or not they are kept for their content.

    `drafted_tokens` and `accepted_tokens` count from the engine's beginning: drafts that were verified, and those of
    them that were right.
    """

    compiled_programs: int
    pages: int
    free_pages: int
    slots: int
    free_slots: int
    waiting: int
    running: int
    drafted_tokens: int
    accepted_tokens: int
