"""The check of docstrings refuses fragments and lets sentences pass."""

import pytest
from check_docstrings import complaints


def check(folder, code):
    path = folder / "module.py"
    path.write_text(code)
    return [line.removeprefix(f"{path}:") for line in complaints(path)]


@pytest.mark.parametrize(
    "text",
    [
        "What a file is.",
        "Of each row, the last.",
        "Those that fit.",
        "Whether it fits.",
        "As `load`.",
        "which, given x",
    ],
)
@pytest.mark.parametrize(
    "code",
    ['"""{}"""', 'class Rows:\n    """{}"""', 'def _rows():\n    """{}"""', 'async def test_rows():\n    """{}"""'],
)
def test_a_fragment_is_refused_wherever_it_stands(tmp_path, code, text):
    line = 1 + code.count("\n")
    assert check(tmp_path, code.format(text)) == [f"{line}: a docstring that begins as a fragment: {text}"]


def test_a_method_of_a_class_is_found_by_its_line(tmp_path):
    code = 'class Rows:\n    """Holds rows."""\n\n    def fit(self):\n        """Whether\n        they fit."""\n'
    assert check(tmp_path, code) == ["5: a docstring that begins as a fragment: Whether"]


@pytest.mark.parametrize("text", ["The rows of a batch.", "Return the rows.", "int32 [rows, n].", "`rows` as int32."])
def test_a_public_function_begins_with_a_verb(tmp_path, text):
    (complaint,) = check(tmp_path, f'def rows():\n    """{text}"""')
    assert complaint == f"2: the docstring of a function that does not begin with a verb: {text}"


@pytest.mark.parametrize(
    "code",
    [
        '"""The rows of a batch, and which of them fit."""',
        'def rows():\n    """Returns what fits."""',
        'def rows():\n    """All-gathers rows."""',
        'def rows():\n    """See `api.rows`."""',
        'def _rows():\n    """The rows of a batch."""',
        'def test_rows():\n    """The rows are those of a batch."""',
        '@property\ndef rows(self):\n    """The number of rows."""',
        '@functools.cached_property\ndef rows(self):\n    """The number of rows."""',
        "def rows(): ...",
    ],
)
def test_sentences_pass(tmp_path, code):
    assert check(tmp_path, code) == []
