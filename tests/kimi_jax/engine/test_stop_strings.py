"""However tokens cut it, an answer ends before the first stop string of its text, and shows none of it before."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.engine.stop_strings import StopStrings, check_stop_strings

PIECES = ["", "a", "b", "ab", "ba", "aab", "c"]


class Pieces:
    """Decodes token i to the i-th piece."""

    def push(self, ids, /):
        return "".join(PIECES[token] for token in ids)


def expected(tokens, strings):
    """Returns the tokens before the first stop string, and whether there is one."""
    for count in range(len(tokens) + 1):
        text = "".join(PIECES[token] for token in tokens[:count])
        places = [text.find(string) for string in strings if string in text]
        if places:
            ends = [len("".join(PIECES[t] for t in tokens[: n + 1])) for n in range(count)]
            return [token for token, end in zip(tokens, ends, strict=False) if end <= min(places)], True
    return tokens, False


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_any_tokens_and_any_strings(tokens, strings):
    stopper, answer = StopStrings(tuple(strings), Pieces()), []
    for token in tokens:
        answer += stopper.push(token)
        shown = "".join(PIECES[t] for t in answer)
        assert not any(string in shown for string in strings)
        if stopper.stopped:
            break
    if not stopper.stopped:
        answer += stopper.rest()
    assert (answer, stopper.stopped) == expected(tokens, strings)


@pytest.mark.parametrize(
    ("strings", "message"),
    [("abc", "no list"), ([3], "no list"), ([""], "0 characters"), (["x" * 10_000], "10,000"), (["x"] * 17, "17")],
)
def test_bad_stop_strings_are_refused(strings, message):
    with pytest.raises(ValueError, match=message):
        check_stop_strings(strings)
