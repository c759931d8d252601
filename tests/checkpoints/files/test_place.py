"""Files behind URLs: whatever goes wrong ends in one clear line that names the URL."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import checkpoints
from checkpoints.files.place import Remote, files_under, identity, locate, read_into, sha256, size

OPERATIONS: dict[str, Callable[[Remote], Any]] = {
    "exists": Remote.exists,
    "is_file": Remote.is_file,
    "is_dir": Remote.is_dir,
    "read_bytes": Remote.read_bytes,
    "read_text": Remote.read_text,
    "glob": lambda remote: list(remote.glob("*")),
    "size": size,
    "read_into": lambda remote: read_into(remote, 0, memoryview(bytearray(1))),
    "sha256": sha256,
    "files_under": files_under,
    "identity": identity,
}
READERS: dict[str, Callable[[str, Path], Any]] = {
    "load": lambda url, _: checkpoints.load(url),
    "load with its checksums": lambda url, _: checkpoints.load(url, verify=True),
    "summary": lambda url, _: checkpoints.summary(url),
    "verify": lambda url, _: checkpoints.verify(url),
    "compare": lambda url, _: checkpoints.verify(url, url),
    "convert": lambda url, out: checkpoints.convert(url, out),
    "export": lambda url, out: checkpoints.export(url, out),
}


class Broken(MemoryFileSystem):
    """A file system whose server answers everything with an error of its library's own."""

    cachable = False

    def _fail(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("503:\n\x1b[31mtry later")

    info = ls = cat_file = find = glob = ukey = _open = _fail


def remote(url: str) -> Remote:
    found = locate(url)
    assert isinstance(found, Remote)
    return found


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (Broken(), url.removeprefix("memory:/")))
    yield "memory://bucket/model"


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_server_that_fails(broken: str, operation: Callable[[Remote], Any]) -> None:
    with pytest.raises(OSError, match=r"^memory:///bucket/model: cannot be read: 503:\\n\\x1b\[31mtry later$"):
        operation(remote(broken))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_names_the_url(broken: str, tmp_path: Path, read: Callable[[str, Path], Any]) -> None:
    with pytest.raises(OSError, match=r"^memory:///bucket/model\S*: cannot be read: 503:\\n\\x1b\[31mtry later$"):
        read(broken, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["exists", "is_file", "is_dir"])
def test_nothing_there_is_no_error(operation: str) -> None:
    assert OPERATIONS[operation](remote("memory://bucket/nowhere")) is False


@pytest.mark.parametrize("operation", ["read_bytes", "size", "read_into", "sha256", "identity"])
def test_no_such_file(operation: str) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory: 'memory:///bucket/nowhere'"):
        OPERATIONS[operation](remote("memory://bucket/nowhere"))


def test_a_kind_is_told_from_another() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/kinds/folder/file", b"abc")
    try:
        folder = locate("memory://kinds/folder")
        assert (folder.exists(), folder.is_dir(), folder.is_file()) == (True, True, False)
        file = folder / "file"
        assert (file.exists(), file.is_dir(), file.is_file(), size(file)) == (True, False, True, 3)
        assert files_under(folder) == ["file"] and [found.name for found in folder.glob("*")] == ["file"]
    finally:
        memory.rm("/kinds", recursive=True)


@pytest.mark.parametrize("url", ["nowhere://bucket/model", "zip://file::nowhere://bucket/model", "http://[half"])
def test_a_url_that_cannot_be_understood(url: str) -> None:
    with pytest.raises(OSError, match=rf"^{re.escape(url)}: cannot be read") as found:
        locate(url).is_dir()
    assert "\n" not in str(found.value)
