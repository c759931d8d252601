"""The README's Python runs as it stands, and the README stays one page."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), names)
    prompt, model = names["prompt"], names["model"]
    assert names["logits"].shape == (*prompt.tokens.shape, model.config.text.vocab_size)
    # The two ways give one answer, the right one
    assert out.getvalue() == "I see 4, 2 and 7. 427\n427\n"
    said = list(names["answer"].token_ids)
    assert names["new"][0, : len(said)].tolist() == said


def test_the_readme_is_one_page_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.split()) <= 600
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / target).is_file(), target
