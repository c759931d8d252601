"""Tools for the files of a folder: what they show, and that nothing leads out of it."""

import asyncio
import contextlib
import os

import pytest

from kimi_jax import agents
from kimi_jax.agents.tools import run_tool


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_text("outside")
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "a.txt").write_text("One\ntwo\n")
    (root / "below" / "b.txt").write_bytes(b"zwei\none\n\xff")
    (root / "picture").write_bytes(b"\0\1")
    (root / "out").symlink_to(tmp_path)
    (root / "secret").symlink_to(tmp_path / "secret.txt")
    (root / "near").symlink_to(root / "a.txt")
    os.mkfifo(root / "pipe")
    return root


def use(folder, name, **arguments):
    return asyncio.run(run_tool(agents.Toolset(agents.files(folder)).find(name), arguments))


def test_listing_reading_and_searching(folder):
    listing = ["a.txt (8 bytes)", "below/", "near (link)", "out (link)", "picture (2 bytes)", "pipe (0 bytes)"]
    assert use(folder, "list_files").splitlines() == [*listing, "secret (link)"]
    assert use(folder, "list_files", path="below/../below/") == "b.txt (10 bytes)"
    assert use(folder, "read_file", path="a.txt") == "One\ntwo"
    assert use(folder, "read_file", path="./below/b.txt", first_line=3) == "\ufffd"
    assert use(folder, "search_files", text="ONE") == "a.txt:1: One\nbelow/b.txt:2: one"
    assert use(folder, "search_files", text="two", path="a.txt") == "a.txt:2: two"
    assert use(folder, "search_files", text="outside") == "nothing is found"
    assert [one.asks for one in agents.files(folder)] == [False] * 3


def test_long_files_listings_and_searches_say_what_is_left_out(folder, monkeypatch):
    (folder / "long").write_text("one\n" * 1_500)
    assert use(folder, "read_file", path="long").endswith("one\n[500 more lines]")
    assert use(folder, "read_file", path="long", first_line=1_499) == "one\none"
    assert use(folder, "search_files", text="one").endswith("[more than 200 lines; search for less]")
    for name, value, tool, arguments, end in [
        ("ENTRIES", 3, "list_files", {}, "long (6000 bytes)\n[5 more]"),
        ("VISITED", 1, "search_files", {"text": "zwei"}, "[only 1 files are searched; search in a folder below]"),
        ("FILE_SIZE", 9, "search_files", {"text": "zwei"}, "nothing is found"),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(agents.file_tools, name, value)
            assert use(folder, tool, **arguments).endswith(end)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../secret.txt", "outside the folder"),
        ("below/../../secret.txt", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        ("//etc/passwd", "outside the folder"),
        ("secret", "a link, which is not followed"),
        ("near", "a link, which is not followed"),
        ("out/secret.txt", "a link, which is not followed|not a directory"),
        ("a.txt/../../secret.txt", "outside the folder"),
        ("a.txt/b", "not a directory"),
        ("none", "no such file"),
        ("below", "not a file"),
        ("pipe", "not a file"),
        ("picture", "not a text"),
        ("a\0", "no path"),
        ("\udcff", "no such file"),
    ],
)
def test_nothing_else_is_read(folder, path, why):
    with pytest.raises(agents.ToolError, match=why):
        use(folder, "read_file", path=path)


def test_a_link_that_takes_a_folders_place_while_it_is_opened_is_not_followed(folder, monkeypatch):
    opened = os.open

    def swapped(part, *arguments, **options):
        if part == "below":
            (folder / "below" / "b.txt").unlink()
            (folder / "below").rmdir()
            (folder / "below").symlink_to(folder.parent)
        return opened(part, *arguments, **options)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(agents.ToolError, match="a link, which is not followed"):
        use(folder, "read_file", path="below/secret.txt")


def test_no_file_stays_open_and_what_is_no_folder_is_refused(folder):
    before = len(os.listdir("/proc/self/fd"))
    for path in (".", "below", "a.txt", "out", "none"):
        for name in ("list_files", "read_file"):
            with contextlib.suppress(agents.ToolError):
                use(folder, name, path=path)
    use(folder, "search_files", text="one")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(NotADirectoryError, match=r"a\.txt: not a folder"):
        agents.files(folder / "a.txt")
    with pytest.raises(agents.ToolError, match="empty"):
        use(folder, "search_files", text="")
