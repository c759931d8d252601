"""Every `kimi-jax` command in README, docs and notebooks is one that there is; those that need no download run."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from kimi_jax.cli import command_parser, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """Returns the arguments of the `kimi-jax` commands in a page's blocks of code, and in the table of recipes, each a
    list. What the shell would know is 0."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    if page.name == "recipes.md":
        blocks += re.findall(r"`(kimi-jax [^`]+)`", text)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("kimi-jax "):
            found.append(
                shlex.split(re.sub(r"\$\w*(ID|RANK)\b", "0", re.sub(r"\$\w*TASKS", "2", line)), comments=True)[1:]
            )
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_are_there(page, capsys):
    parser = command_parser()
    for words in commands(page):
        try:
            parser.parse_args(words)
        except SystemExit as end:
            assert end.code == 0, f"kimi-jax {shlex.join(words)}: {capsys.readouterr().err}"


# Pages whose commands need neither a download nor a conversation: all those of these programs are run
RUN = {
    "laptop.md": ("inspect", "make-toy", "generate"),
    "converting-k2.5.md": ("make-toy", "convert toy", "verify toy-orbax"),
    "recipes.md": ("plan",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_commands_that_need_no_download_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in commands(ROOT / "docs" / name):
        if shlex.join(words).startswith(RUN[name]):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main(words) == 0, words
            assert out.getvalue().strip()
            ran += 1
    assert ran >= len(RUN[name]) - 1
