"""Calls the command in tests and checks the results."""

from pathlib import Path

import kimi_jax
from kimi_jax.cli import main


def generate(folder, *arguments):
    return main(["generate", str(folder), *map(str, arguments)])


def answer(kimi, folder, messages, *, tools=None, thinking=True, **options):
    """Returns the text that the command should print: that of `kimi_jax.generate`'s tokens, up to the stop."""
    processor = kimi_jax.Processor.from_folder(folder)
    prompt = processor(messages, tools, thinking, files=Path("/"))
    stops = kimi.config.stop_ids
    new = kimi_jax.generate(kimi, prompt.tokens, media=prompt.media, stop_ids=stops, **options)[0].tolist()
    end = next((i for i, token in enumerate(new) if token in stops), len(new))
    return processor.tokenizer.decode(new[:end]) + "\n", end + (end < len(new))


def user(content):
    return [{"role": "user", "content": content}]


def refused(capsys, code):
    """Returns the one line that a refusal writes, and checks that standard output has at most a progress bar."""
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kimi-jax: "), lines
    return lines[0]
