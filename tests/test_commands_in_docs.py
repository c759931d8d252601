"""Every command in README and docs is one that there is, flags and all, and is run by a test or has its reason here."""

import argparse
import ast
import contextlib
import io
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT, blocks
from doc_commands import Command, commands
from PIL import Image

from kimi_jax import small
from kimi_jax.cli import command_parser, main

# Stands for a value that a reader knows
PLACEHOLDER = re.compile(r"\b[A-Z]+\b|\.\.\.|\|")
# Programs that are not ours, and why no test runs them
OTHERS = {
    "gcloud": "rents TPUs",
    "srun": "a cluster",
    "docker": "a daemon of containers; tests/test_wheel.py installs what the image has",
    "hf": "downloads 595 GB",
    "git": "a network",
    "mkdir": "in a virtual machine of a TPU",
    "gcsfuse": "a bucket",
    "cd": "after git clone",
    "claude": "a program of its own, for the server of the page",
    "curl": "the request is one of tests/kimi_jax/server/test_openai_chat.py",
    "pytest": "the tests of another repository",
    "python3": "the environment, as the Makefile makes it",
    **dict.fromkeys(("export", "for", "do", "done", "wait"), "the shell's own"),
}
# Commands of blocks that `test_commands_run` runs, and what it appends, so that a command ends soon
RUN = {
    "kimi-jax inspect ": "",
    "kimi-jax make-toy toy ": "",
    "kimi-jax convert toy ": "",
    "kimi-jax convert ~/models/": "",
    "kimi-jax verify ": "",
    "kimi-jax export ": "",
    "kimi-jax plan --list": "",
    "kimi-jax plan ": "--no-compile",
    "kimi-jax generate toy ": "",
    "kimi-jax generate ~/models/k2.5 --prompt ": "--max-new-tokens 24",
    "kimi-jax generate ~/models/k2.5 --prompts ": "--max-new-tokens 24 --slots 1 --prefill-chunk 16",
    "kimi-jax agent 'Add the numbers.'": "--trace-out run.jsonl",
    "kimi-jax trace ": "",
    "kimi-jax chat --model linear": "--greedy",
    "kimi-jax train ~/models/k2.5 ": "--steps 1 --batch 2 --tokens 256",
}
# The other commands of blocks: the test that runs such a command, or why none does
APART = {
    "kimi-jax demo ": "tests/test_wheel.py",
    "kimi-jax chat http://": "tests/kimi_jax/server/test_chat_command.py",
    "kimi-jax chat": "tests/kimi_jax/server/test_chat_command.py",
    "kimi-jax agent FOLDER ": "tests/kimi_jax/agents/test_agent_command.py",
    "kimi-jax agent http://": "tests/kimi_jax/agents/test_agent_command.py",
    "kimi-jax convert gs://": "a bucket; tests/checkpoints/files reads URLs",
    "kimi-jax serve ": "tests/kimi_jax/server/test_serve_command.py",
    "kimi-jax train FOLDER ": "tests/kimi_jax/training/test_run.py",
    "kimi-jax generate FOLDER --prompts prompts.jsonl --part": "tests/kimi_jax/test_offline.py",
    "kimi-jax generate ~/models/kimi-linear-48b ": "98 GB, as are those of /models and DIR",
    "kimi-jax generate /models/": "98 GB and more",
    "kimi-jax generate DIR ": "98 GB and more",
    "kimi-jax generate ~/models/kimi-k3 --draft ": "tests/kimi_jax/cli/test_commands.py",
    "kimi-jax plan --model k2.5 --topology v6e:8x8 --batch 64 --draft ": "tests/kimi_jax/plan/test_plan.py",
    "kimi-jax generate ~/models/kimi-k2.5-orbax ": "tests/kimi_jax/test_processes.py",
    "kimi-jax generate ~/models/k2.5 --distributed": "tests/kimi_jax/test_processes.py",
    "kimi-jax generate FOLDER --prompt Hello --mesh 1x8 --distributed": "tests/kimi_jax/test_processes.py",
}
OURS = [(page, command) for page in PAGES for command in commands(page) if command.words[0] == "kimi-jax"]


def refusal(words):
    """Returns what the parser says against the words of a command, "" for nothing."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            command_parser().parse_args(words)
        except SystemExit as end:
            return err.getvalue() if end.code else ""
    return ""


def flags_of(parser):
    """Returns the flags of each command."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: set(sub._option_string_actions) for name, sub in subparsers.choices.items()}


FLAGS = flags_of(command_parser())


def check_ours(command):
    words = command.words[1:]
    if PLACEHOLDER.fullmatch(words[0]) or words[0].startswith("--"):
        return  # `kimi-jax COMMAND --help`
    assert words[0] in FLAGS, command
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= FLAGS[words[0]], (given - FLAGS[words[0]], command)
    refused = refusal(words)
    named = PLACEHOLDER.search(str(command)) or re.search("arguments are required|expected one argument", refused)
    assert not refused or (named and not command.whole), (command, refused)


def check_make(command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in command.words[1:] if "=" not in word} <= set(targets), command


def check_pip(command):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"(?:kimi-jax|\s'?\.)\[(\w[\w,-]*)\]", " ".join(command.words)):
        assert set(name.split(",")) <= set(extras), command


def check_python(command):
    """Checks that a script or module of ours is there, and has the flags."""
    first, *words = command.words[1:]
    if first == "-m":
        name, *words = words
        if name == "pytest":
            assert (ROOT / words[0]).exists(), command
            return
        path = ROOT / name.replace(".", "/") / "__main__.py"
    else:
        path = ROOT / first
    literals = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    flags = {word for word in words if word.startswith("--")}
    assert flags <= literals, (flags - literals, command)


CHECKS = {"kimi-jax": check_ours, "make": check_make, "pip": check_pip, "python": check_python}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_are_there(page):
    for command in commands(page):
        program = command.words[0]
        assert program in CHECKS or program in OTHERS, f"{page.name}: {command}: no reason why no test runs it"
        if program in CHECKS:
            CHECKS[program](command)


def test_every_command_of_a_block_is_run_or_has_its_reason():
    used = set()
    for page, command in OURS:
        if command.whole:
            begun = [begin for table in (RUN, APART) for begin in table if begins(command, begin)]
            assert begun, f"{page.name}: {command}: run by no test, without a reason"
            used.add(max(begun, key=len))
    assert used == RUN.keys() | APART.keys()
    for who in APART.values():
        if who.startswith("tests/"):
            assert (ROOT / who).is_file(), who


def begins(command: Command, begin: str) -> bool:
    return f"{command} ".startswith(begin)


def appended(command: Command) -> list[str] | None:
    """Returns what is appended to a command that is run, None for one that is not."""
    begin = max((begin for table in (RUN, APART) for begin in table if begins(command, begin)), key=len, default="")
    return RUN[begin].split() if begin in RUN else None


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Enters a home with what the commands name: small models in place of large ones, pictures, prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    models = tmp_path / "models"
    shutil.copytree(small.path("k25-digits"), models / "Kimi-K2.5")
    with contextlib.redirect_stdout(io.StringIO()):
        head = ["--head-for", str(models / "Kimi-K2.5"), "--head", "eagle3.1-mla"]
        assert main(["make-toy", str(models / "kimi-k3-eagle3.1-mla"), *head]) == 0
    shutil.copy(small.picture("427"), "cat.png")
    upper, lower = (Image.open(small.picture(number)).convert("RGB") for number in ("58", "316"))
    both = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height))
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    both.save("two-numbers.png")
    asked = {"messages": [{"role": "user", "content": "Hello"}]}
    Path("questions.jsonl").write_text("".join(json.dumps({"id": i, **asked}) + "\n" for i in range(2)))
    answered = [*asked["messages"], {"role": "assistant", "content": "Hello!"}]
    Path("chats.jsonl").write_text((json.dumps({"messages": answered}) + "\n") * 4)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sorted({page.name for page, command in OURS if command.whole and appended(command) is not None}),
)
def test_commands_run(name, prepared, monkeypatch):
    printed = ""
    for page, command in OURS:
        if page.name != name or not command.whole or (more := appended(command)) is None:
            continue
        words = [word.replace("~", str(prepared)) for word in command.words[1:]] + more
        monkeypatch.setattr("sys.stdin", io.StringIO("Add 12 and 30.\n"))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                code = main(words)
            except SystemExit as end:  # of `--list`
                code = end.code
        assert code == 0, words
        assert out.getvalue().strip() or "--out" in words or "--plot" in words, words
        printed += out.getvalue()
    if name == "planner.md":
        (table,) = (block.text for block in blocks(ROOT / "docs" / name) if block.language == "text")
        rows, found = ({" ".join(line.split()) for line in text.splitlines()} for text in (table, printed))
        assert rows <= found
