"""Counts the tokens of a request."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Tokens of one choice, or of several together: the prompt's, those generated, those of the prompt that were found
    computed, and those generated as reasoning."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


def total(choices: Sequence[Usage]) -> Usage:
    """Returns the counts of choices after one prompt, which counts once, with what the first found computed of it."""
    if not choices:
        return Usage()
    counts = add(choices)
    return Usage(choices[0].prompt, counts.completion, choices[0].cached, counts.reasoning)


def add(usages: Sequence[Usage]) -> Usage:
    """Returns the counts of several prompts together."""
    return Usage(
        sum(one.prompt for one in usages),
        sum(one.completion for one in usages),
        sum(one.cached for one in usages),
        sum(one.reasoning for one in usages),
    )
