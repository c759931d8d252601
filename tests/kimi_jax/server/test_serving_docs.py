"""The Python of docs/clients.md runs as it stands, against a server on another port."""

import gc
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "clients.md"
PIECES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("code", PIECES, ids=lambda code: re.findall(r"^(?:from|import) (\w+)", code, re.M)[0])
def test_the_clients_of_the_page_get_answers(served, capsys, code):
    for module in re.findall(r"^(?:from|import) (\w+)", code, re.M):
        pytest.importorskip(module)
    code = code.replace("http://127.0.0.1:8000", served.listener.url).replace('"kimi-k2.5"', '"kimi-toy"')
    served.engine.text = "Let me see.</think>Hello!"
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    client = names.get("client")
    if hasattr(client, "__exit__"):  # (those of async clients end with their event loop)
        client.close()
    assert "Hello!" in capsys.readouterr().out
    prompt = served.engine.processor.tokenizer.decode(served.engine.requests[-1].tokens)
    assert ("Tells the weather of a city." in code) == ("Tells the weather of a city." in prompt)
    names.clear()
    gc.collect()  # here, where warnings of connections that nobody closes are expected
