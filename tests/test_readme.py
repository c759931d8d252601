"""The README's Python runs as it stands, and the README stays one page."""

import contextlib
import io
import re
from pathlib import Path

from checkpoints.toy import toy_config, write_toy

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    write_toy(
        tmp_path / "toy",
        toy_config("k2", hidden_size=64, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=8),
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), names)
    prompt, model = names["prompt"], names["model"]
    assert names["logits"].shape == (*prompt.tokens.shape, model.config.text.vocab_size)
    assert names["new"].shape == (1, 24)
    # The two ways give one answer
    assert names["answer"].token_ids == tuple(names["new"][0].tolist())
    assert out.getvalue() == f"{names['answer'].content}\n" * 2 and len(out.getvalue()) > 20


def test_the_readme_is_one_page_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.split()) <= 600
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (README.parent / target).is_file(), target
