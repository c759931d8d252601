"""Calls of the command, and what should come of them."""

from pathlib import Path

import kimi_jax
from kimi_jax import prompts
from kimi_jax.cli import main


def generate(folder, *arguments):
    return main(["generate", str(folder), *map(str, arguments)])


def answer(kimi, folder, messages, *, tools=None, thinking=True, **options):
    """What the command should print: the text of `kimi_jax.generate`'s tokens, up to the stop."""
    tokenizer = kimi_jax.Tokenizer.from_folder(folder)
    prompt = prompts.prepare(folder, kimi.config, tokenizer, messages, tools=tools, thinking=thinking, files=Path("/"))
    stops = kimi.config.stop_ids
    new = kimi_jax.generate(kimi, prompt.tokens, media=prompt.media, stop_ids=stops, **options)[0].tolist()
    end = next((i for i, token in enumerate(new) if token in stops), len(new))
    return tokenizer.decode(new[:end]) + "\n", end + (end < len(new))


def user(content):
    return [{"role": "user", "content": content}]


def refused(capsys, code):
    """The one line that a refusal writes, and nothing on standard output but what a progress bar leaves."""
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kimi-jax: "), lines
    return lines[0]
