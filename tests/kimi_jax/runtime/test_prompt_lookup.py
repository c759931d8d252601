"""Prompt lookup drafts what followed the longest of the newest places that are alike."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.runtime.drafts import PLACES, SHORTEST, PromptLookup


def expected(tokens, count):
    ends = [end for end in range(SHORTEST, len(tokens)) if tokens[end - SHORTEST : end] == tokens[-SHORTEST:]]

    def alike(end):
        return next((n for n in range(end) if tokens[end - 1 - n] != tokens[-1 - n]), end)

    best = max(reversed(ends[-PLACES:]), key=alike, default=None)
    return [] if best is None else tokens[best : best + count]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 7))
def test_as_a_search_through_all_places(tokens, count):
    # Given a drafter that has seen every beginning, or only some
    often, seldom = PromptLookup(), PromptLookup()
    for end in range(len(tokens) + 1):
        assert list(often.propose(tokens[:end], count)) == expected(tokens[:end], count)
        if end % 7 == 0:
            assert list(seldom.propose(tokens[:end], count)) == expected(tokens[:end], count)


def test_nothing_follows_what_is_new():
    assert PromptLookup().propose([1, 2, 3, 4, 1, 2], 4) == ()
    assert PromptLookup().propose([1, 2, 3, 4, 9, 1, 2, 3], 4) == (4, 9, 1, 2)
