"""Folders named by URLs, and files of another kind than their names say."""

from pathlib import Path

import fsspec
import pytest
from calls import generate, refused

from kimi_jax.cli import main
from kimi_jax.cli.arguments import place


def test_urls_of_local_files_are_their_paths():
    assert place("file:///models/a%20b") == place("FILE://localhost/models/a b") == Path("/models/a b")
    assert place("gs://bucket/a") == "gs://bucket/a"
    assert place("a:b//c") == Path("a:b//c")


def test_every_command_takes_the_url_of_a_local_folder(published, kimi, loads, tmp_path, capsys):
    url = f"file://{published}"
    assert main(["inspect", url]) == 0
    assert main(["convert", url, f"file://{tmp_path}/orbax"]) == 0
    assert main(["verify", url, f"file://{tmp_path}/orbax"]) == 0
    assert main(["export", f"file://{tmp_path}/orbax", str(tmp_path / "back")]) == 0
    assert main(["make-toy", str(tmp_path / "toy"), "--from", url, "--layers", "1"]) == 0
    assert main(["plan", "--model", url, "--topology", "v5e:2x2", "--context=64", "--no-compile"]) == 0
    assert generate(url, "--prompt", "Hello", "--max-new-tokens", 1) == 0
    assert loads[-1][0] == published and capsys.readouterr().err.startswith("loaded in ")


def test_checkpoints_behind_other_urls(published, tmp_path, capsys):
    assert main(["convert", str(published), str(tmp_path / "orbax")]) == 0
    memory = fsspec.filesystem("memory")
    for name, folder in (("published", published), ("orbax", tmp_path / "orbax")):
        for file in folder.rglob("*"):
            if file.is_file():
                memory.pipe(f"/cli/{name}/{file.relative_to(folder)}", file.read_bytes())
    try:
        url = "memory://cli/published"
        assert main(["inspect", url]) == main(["inspect", "memory://cli/orbax"]) == 0
        assert main(["verify", url, "memory://cli/orbax"]) == main(["verify", "memory://cli/orbax"]) == 0
        assert main(["export", "memory://cli/orbax", str(tmp_path / "back")]) == 0
        assert main(["make-toy", str(tmp_path / "toy"), "--from", url, "--layers", "1"]) == 0
        assert main(["plan", "--model", url, "--topology", "v5e:2x2", "--context=64", "--no-compile"]) == 0
        capsys.readouterr()
        line = refused(capsys, generate(url, "--prompt", "a"))
        assert line.startswith(f"kimi-jax: {url}: the tokenizer is read from a folder on this machine")
    finally:
        memory.rm("/cli", recursive=True)


@pytest.mark.parametrize("url", ["nonsense://a/b", "memory://cli/none"])
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["generate", "--prompt=a"], ["make-toy", "x", "--from"]])
def test_a_url_that_leads_nowhere_is_named(url, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, main([*command, url]))
    assert url.replace("memory://", "memory:///") in line or url in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ["convert", "a", "gs://bucket/b"],
        ["export", "a", "hf://b"],
        ["make-toy", "s3://b", "--like", "k2"],
        ["inspect", "file://host/a"],
        ["inspect", "file://relative"],
        ["generate", "a", "--chat", "https://host/chat.json"],
        ["plan", "--model", "k2", "--topology", "all", "--plot", "gs://b/c.png"],
    ],
)
def test_a_url_where_none_can_be(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    err = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and "://" in err and "expected " in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[" * 100_000, "nests deeper than 64 levels"),
        ('{"messages": [], "messages": []}', "gives the name 'messages' twice"),
        ("[NaN]", "holds NaN"),
        ("{}", "expected a JSON list of messages, or an object"),
        ('"hello"', "expected a JSON list of messages, or an object"),
        ('{"messages": [], "tools": {}}', "expected a JSON list of messages, or an object"),
    ],
)
def test_a_chat_file_that_holds_something_else(published, tmp_path, capsys, text, found):
    chat = tmp_path / "chat.json"
    chat.write_text(text)
    line = refused(capsys, generate(published, "--chat", chat))
    assert line.startswith(f"kimi-jax: {chat}: ") and found in line


@pytest.mark.filterwarnings("default")
def test_what_a_chat_file_says_besides_is_named(published, loads, tmp_path, capsys):
    chat = tmp_path / "chat.json"
    chat.write_text('{"messages": [{"role": "user", "content": "Hello"}], "temperature": 1, "stream": true}')
    assert generate(published, "--chat", chat, "--max-new-tokens", 1) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"kimi-jax: warning: {chat}: only messages and tools are read, not stream, temperature"
