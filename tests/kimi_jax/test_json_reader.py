"""JSON from outside is read whole and finite, or refused in one line that names its file."""

import io
import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax import json_reader
from kimi_jax.bounded_read import PIECE, read_at_most
from kimi_jax.json_reader import MAX_DEPTH, JSONError
from kimi_jax.printable import printable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer, .* run `git lfs pull`"),
        (b"\xef\xbb\xbf<!doctype html>", "is a web page"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\\ud83d"', "not UTF-8"),
        ('"\ud83d"', "not UTF-8"),
        (b"[NaN]", "NaN, which is not JSON"),
        (b"[-Infinity]", "-Infinity, which is not JSON"),
        (b"[1e999]", "1e999, which is not finite"),
        (b"[" + b"9" * 5000 + b"]", "a number of more than 4,300 digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "gives the name 'c' twice"),
        (b"[" * 100_000 + b"]" * 100_000, f"deeper than {MAX_DEPTH} levels"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"0" + b"}" * (MAX_DEPTH + 1), f"deeper than {MAX_DEPTH} levels"),
    ],
)
def test_what_is_not_finite_unique_json_is_refused_by_name(data, message):
    with pytest.raises(JSONError, match=message) as error:
        json_reader.parse(data, "some.json")
    assert str(error.value).startswith("some.json: ")
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_the_deepest_that_is_taken():
    assert json_reader.parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    assert json_reader.parse(b'"\\ud83d\\ude00"', "x") == "\N{GRINNING FACE}"


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_what_python_writes_is_read_as_written(value):
    assert json_reader.parse(json.dumps(value).encode(), "x") == value


@given(
    st.binary(max_size=60)
    | st.text(string.printable, max_size=60)
    | st.text('[]{}",:0123456789.eE-ntf\\u', max_size=60)
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_value_or_our_own_error(data):
    try:
        value = json_reader.parse(data, "x")
    except JSONError:
        return
    assert json_reader.parse(json.dumps(value), "x") == value


def test_a_file_is_bounded_and_an_object_where_one_is_asked_for(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text("[1, 2]")
    assert json_reader.read(file) == [1, 2]
    with pytest.raises(JSONError, match=r"a\.json: has 6 bytes, expected at most 5"):
        json_reader.read(file, max_bytes=5)
    with pytest.raises(JSONError, match=r"/dev/zero: has 1,001 bytes, expected at most 1,000"):
        json_reader.read(Path("/dev/zero"), max_bytes=1000)
    with pytest.raises(KeyError, match="expected a JSON object, found a list"):
        json_reader.read_object(file, error=_OursError)


class _OursError(KeyError, ValueError):
    """Stands for a caller's own class of error."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode \N{GRINNING FACE}", "plain ünïcode \N{GRINNING FACE}"),
        ("a\x1b[2Jb\nc", "a\\x1b[2Jb\\nc"),
        ("a\u202eb\u2028c\x9bd\ud800", "a\\u202eb\\u2028c\\x9bd\\ud800"),
        ("x" * 1000, "xx ... (1,000 characters) ... xx"),
    ],
)
def test_printable_text_steers_no_terminal_and_has_an_end(text, shown):
    assert printable(text, 4 if "..." in shown else 200) == shown


@pytest.mark.parametrize(("size", "limit"), [(0, 10), (PIECE, PIECE), (PIECE + 1, PIECE), (3 * PIECE, 10)])
def test_a_read_asks_for_no_more_than_the_file_has(size: int, limit: int) -> None:
    """A reader that asks for `limit` bytes at once allocates them all, even for a file of ten bytes."""

    class File:
        def __init__(self, data: bytes):
            self.stream = io.BytesIO(data)

        def read(self, count: int, /) -> bytes:
            assert 0 < count <= PIECE
            return self.stream.read(count)

    assert len(read_at_most(File(b"x" * size), limit)) == min(size, limit + 1)
