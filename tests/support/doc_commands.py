"""Reads the commands of a page of documentation: of its blocks of shell, of its unit files and manifests, and in its
text."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from doc_blocks import blocks

WRAPPERS = ("srun", "docker run")  # what begins with them ends in a command of ours
PROGRAMS = ("kimi-jax", "make", "python", "pip")  # of commands in text


class Command(NamedTuple):
    """A command: its words, the first of which is the program's name without its folder, and whether it stands in a
    block, and so as a person would type it."""

    words: list[str]
    whole: bool

    def __str__(self) -> str:
        return " ".join(shlex.quote(word) if " " in word else word for word in self.words)


def commands(page: Path) -> list[Command]:
    """Returns the commands of a page in their order, those in its text last."""
    found = [words for block in blocks(page) for words in _of_block(block.language, block.text)]
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", text)]
    begins = re.compile(rf"({'|'.join(PROGRAMS)}) ")
    partial = [words for code in inline if begins.match(code) for words in of_shell(code)]
    return [*(Command(words, True) for words in found), *(Command(words, False) for words in partial)]


def _of_block(language: str, text: str) -> Iterator[list[str]]:
    if language in ("", "sh"):
        yield from of_shell(text)
    elif language == "ini":
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("ExecStart="):
                yield from of_shell(line.partition("=")[2])
    elif language == "yaml":
        for document in yaml.safe_load_all(text):
            yield from _of_manifest(document)


def _of_manifest(node: object) -> Iterator[list[str]]:
    if isinstance(node, dict):
        if "command" in node:
            yield [str(word) for word in node["command"]]
        for value in node.values():
            yield from _of_manifest(value)
    elif isinstance(node, list):
        for value in node:
            yield from _of_manifest(value)


def of_shell(text: str) -> Iterator[list[str]]:
    """Yields the commands of a piece of shell, also those that a command has the shell of another machine run. A number
    that the shell would know is 0, and a count of processes 2."""
    text = re.sub(r"(^|\s)#.*", "", text.replace("\\\n", " "))
    text = re.sub(r"\$\{?(?i:\w*(id|rank)|i)\b\}?", "0", re.sub(r"\$\w*TASKS\b", "2", text))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not re.fullmatch(r"[;&\n]+", token):
            words.append(token)
            continue
        if words:
            yield from _unwrapped(words)
        words = []


def _unwrapped(words: list[str]) -> Iterator[list[str]]:
    program, *rest = words
    yield [program.rpartition("/")[2], *rest]
    for word in rest:
        if word.startswith("--command="):
            yield from of_shell(word.partition("=")[2])
    if shlex.join(words).startswith(WRAPPERS) and "kimi-jax" in rest:
        yield rest[rest.index("kimi-jax") :]
