"""The Python of docs/serving.md runs as it stands, against a server on another port."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
PIECES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", PIECES)
def test_the_clients_of_the_page_get_answers(served, capsys, code):
    code = code.replace("http://127.0.0.1:8000", served.listener.url).replace('"kimi-k2.5"', '"kimi-toy"')
    served.engine.text = "Let me see.</think>Hello!"
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    names["client"].close()
    assert "Hello!" in capsys.readouterr().out
