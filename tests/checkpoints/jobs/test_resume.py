"""Whatever stops a conversion, and whenever: nothing looks whole that is not, and the same command finishes it."""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_oracle import same_folders

from checkpoints import CheckpointError, convert
from checkpoints.files.lock import hold_lock
from checkpoints.jobs import journal
from checkpoints.stored import chunk_grid, companions, orbax_metadata

module = importlib.import_module("checkpoints.jobs.convert")  # the package's attribute of that name is the function
LEAF = "model.layers.1.mlp.experts.up_proj.weight"


def stop_after(monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException) -> None:
    """Makes the next conversion write so many chunks, then half of one."""
    write, left = module.write_file, [writes]

    def failing(file: Path, pieces: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            write(file, [piece[: piece.nbytes // 2] for piece in pieces])
            raise error
        write(file, pieces)

    monkeypatch.setattr(module, "write_file", failing)


@pytest.fixture
def stopped(published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Returns a source of its own and a destination, whose conversion was stopped halfway."""
    source = shutil.copytree(published["k2"], tmp_path / "source")
    with monkeypatch.context() as patch:
        stop_after(patch, 40, OSError("pulled the plug"))
        with pytest.raises(OSError, match="pulled the plug"):
            convert(source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    return source, tmp_path / "out"


def goes_on(source: Path, target: Path, like: Path) -> int:
    """Bytes that were found, once the conversion is finished and just as one that nothing stopped."""
    report = convert(source, target)
    assert report.whole and same_folders(target, like)
    assert list(target.parent.glob("*.partial")) == []
    return report.found_bytes


def test_killed_at_twenty_random_moments(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 16384)  # two that are lost half written are 2.4 % of the toy
    convert(published["k2"], tmp_path / "like")
    driver = Path(__file__).with_name("killing.py")
    command = [sys.executable, driver, "convert", published["k2"], tmp_path / "out", "20", str(chunk_grid.CHUNK_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == 20
    assert same_folders(tmp_path / "out", tmp_path / "like")
    assert counts["begun"] - counts["total"] <= 0.05 * 20 * counts["total"]


@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyboardInterrupt()])
def test_an_error_or_interrupt_leaves_what_was_made(
    published: dict[str, Path], converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 30, error)
        with pytest.raises(type(error)):
            convert(published["k2.5"], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "kimi_manifest.json").exists()
    assert goes_on(published["k2.5"], tmp_path / "out", converted["k2.5"]) > 0


def test_a_full_disk(
    published: dict[str, Path], converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 30, OSError(errno.ENOSPC, "No space left on device"))
        message = r"out\.partial: No space left on device; the same command goes on when there is room"
        with pytest.raises(OSError, match=message):
            convert(published["k2"], tmp_path / "out")
    assert goes_on(published["k2"], tmp_path / "out", converted["k2"]) > 0


def test_a_lost_bucket(
    published: dict[str, Path], converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{published['k2']}/", "/bucket/k2/", recursive=True)
    cat_file, left = memory.cat_file, [40]

    def failing(*args: Any, **kwargs: Any) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("503, try later")
        return cat_file(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(memory, "cat_file", failing)
            with pytest.raises(OSError, match=r"memory:///bucket/k2/model-\S+: cannot be read: 503, try later"):
                convert("memory://bucket/k2", tmp_path / "out")
        report = convert("memory://bucket/k2", tmp_path / "out")
        assert report.found_bytes > 0 and same_folders(tmp_path / "out", converted["k2"])
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_small_file_system(published: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(OSError, match=r"out\.partial: No space left on device: [0-9,]+ bytes are to be written, "):
            convert(published["k2"], disk / "out")
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert goes_on(published["k2"], disk / "out", converted["k2"]) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def _lines(partial: Path) -> list[Any]:
    return [json.loads(line) for line in (partial / ".conversion" / "journal-0.jsonl").read_text().splitlines()]


def test_power_is_lost_before_chunks_are_on_the_disk(stopped: tuple[Path, Path], converted: dict[str, Path]) -> None:
    """Their lines in the journal may be there all the same, and half of the next one."""
    source, target = stopped
    partial = target.with_name("out.partial")
    lines = _lines(partial)
    assert [line for line in lines if isinstance(line, dict)] == [{"synced": 0}] and len(lines) == 41
    for path, number, _ in lines[-3:]:
        file = sorted((partial / path).glob("c*"))[number]
        file.write_bytes(bytes(file.stat().st_size))
    with (partial / ".conversion" / "journal-0.jsonl").open("a") as stream:
        stream.write('["model.layers.1.mlp')
    goes_on(source, target, converted["k2"])


def test_what_is_marked_as_safe_is_believed_unless_it_is_gone(
    stopped: tuple[Path, Path], converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = stopped
    partial = target.with_name("out.partial")
    with monkeypatch.context() as patch:  # the second attempt begins by making safe what the first has written
        stop_after(patch, 0, OSError("again"))
        with pytest.raises(OSError, match="again"):
            convert(source, target, workers=1)
    lines = _lines(partial)
    assert lines[-1] == {"synced": 40}
    digests = []
    monkeypatch.setattr(journal, "digest", lambda chunk, digest=journal.digest: digests.append(1) or digest(chunk))
    path, number, _ = lines[5]
    next((partial / path).glob("c*")).unlink()
    assert number == 0
    goes_on(source, target, converted["k2"])
    total = sum(len(list(leaf.glob("c*"))) for leaf in converted["k2"].iterdir() if leaf.is_dir())
    assert len(digests) == total - 40 + 1


@pytest.mark.parametrize("step", ["write_array_metadata", "copy_companions", "write_whole", "rename", "rmtree"])
def test_stopped_while_it_is_made_whole(
    published: dict[str, Path],
    converted: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """After each step but the last, as if the next had never begun."""

    def after(action: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> None:
            action(*args, **kwargs)
            raise KeyboardInterrupt

        return failing

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", after(Path.rename))
        elif step == "rmtree":
            patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            owner = next(place for place in (module, companions, orbax_metadata) if hasattr(place, step))
            patch.setattr(owner, step, after(getattr(owner, step)))
        with pytest.raises(KeyboardInterrupt):
            convert(published["k2"], tmp_path / "out")
    assert (tmp_path / "out").exists() == (step == "rmtree")
    assert goes_on(published["k2"], tmp_path / "out", converted["k2"]) > 0


@pytest.mark.parametrize(
    "line",
    [
        *(b"5", b"null", b"{}", b'["a"]', b"[[1],[2],[3]]", b'["lm_head.weight","0","aa"]', b"\xff"),
        *(b'["lm_head.weight",-1,"aa"]', b'["lm_head.weight",0.5,"aa"]', b'{"synced":1000000}', b'{"synced":"x"}'),
        b"[" * 9999 + b"]" * 9999,
    ],
)
def test_a_line_that_no_journal_has_ends_it(
    stopped: tuple[Path, Path], converted: dict[str, Path], line: bytes
) -> None:
    source, target = stopped
    with (target.with_name("out.partial") / ".conversion" / "journal-0.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    assert goes_on(source, target, converted["k2"]) > 0


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("[]", "expected a JSON object, found a list")])
def test_settings_that_cannot_be_read(stopped: tuple[Path, Path], text: str, message: str) -> None:
    source, target = stopped
    (target.with_name("out.partial") / ".conversion" / "settings.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"settings\.json: {message}"):
        convert(source, target)


def test_a_file_that_goes_along_no_more(
    stopped: tuple[Path, Path], converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was stopped at the end had carried it."""
    source, target = stopped
    (source / "old.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, target)
    assert (target.with_name("out.partial") / "old.json").exists()
    (source / "old.json").unlink()
    assert goes_on(source, target, converted["k2"]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: (source / "config.json").write_text("{}"), r"config\.json: changed: it is not the file"),
        (lambda source: (source / "tiktoken.model").write_text("x"), r"tiktoken\.model: changed: it is not the file"),
        (lambda source: (source / "tiktoken.model").unlink(), r"tiktoken\.model: changed: it was there when"),
        (
            lambda source: (source / "chat_template.jinja").write_text("x"),
            r"template\.jinja: changed: it was not there",
        ),
    ],
)
def test_what_goes_along_changes_while_it_is_converted(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    source, sync, left = shutil.copytree(published["k2"], tmp_path / "source"), journal.Journal.sync, [2]

    def changing(self: journal.Journal) -> None:
        sync(self)
        left[0] -= 1
        if left[0] == 0:  # the first comes before any chunk
            change(source)

    monkeypatch.setattr(journal.Journal, "sync", changing)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes(stopped: tuple[Path, Path], converted: dict[str, Path]) -> None:
    source, target = stopped
    file = source / "model-00002-of-000003.safetensors"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    message = (
        r"out\.partial: was begun otherwise: files model-00002-of-000003.safetensors changed was (\d+), is \d+; "
        "go on as it was begun, or remove it"
    )
    with pytest.raises(FileExistsError, match=message):
        convert(source, target)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert goes_on(source, target, converted["k2"]) > 0
    os.utime(file)  # a finished checkpoint is one of the source's contents
    assert convert(source, target).made_bytes == 0


def test_a_source_that_changes_while_it_is_converted(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(published["k2"], tmp_path / "source")
    sync = journal.Journal.sync

    def touching(self: journal.Journal) -> None:
        os.utime(source / "model-00003-of-000003.safetensors", ns=(0, self._lines))
        sync(self)

    monkeypatch.setattr(journal.Journal, "sync", touching)
    with pytest.raises(CheckpointError, match=r"00003-of-000003\.safetensors: changed while it was converted"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_writers_do_not_mix(stopped: tuple[Path, Path], converted: dict[str, Path]) -> None:
    source, target = stopped
    partial = target.with_name("out.partial")
    message = rf"out\.partial: process 0 of this conversion is running: pid {os.getpid()} on "
    with (
        hold_lock(partial / ".conversion" / "lock-0", "theirs"),
        pytest.raises(FileExistsError, match=message),
    ):
        convert(source, target)
    with pytest.raises(FileExistsError, match="was begun otherwise: num_processes was 1, is 2"):
        convert(source, target, num_processes=2)
    config = source / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    with pytest.raises(FileExistsError, match=r"was begun otherwise: config was [0-9a-f]{64}, is "):
        convert(source, target)
    config.write_text(text)
    assert goes_on(source, target, converted["k2"]) > 0


def test_several_processes_split_one_conversion(
    published: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    def part(index: int) -> Any:
        return convert(published["k2"], tmp_path / "out", process_index=index, num_processes=3)

    first = part(1)
    assert not first.whole and not (tmp_path / "out").exists()
    with ThreadPoolExecutor() as pool:
        reports = [first, *pool.map(part, [0, 2])]
    assert any(report.whole for report in reports)
    assert same_folders(tmp_path / "out", converted["k2"])
    total = part(0).found_bytes
    assert sum(report.made_bytes for report in reports) == total
    assert all(0.1 * total < report.made_bytes < 0.7 * total for report in reports)


def test_bad_numbers(published: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory of 1,000 bytes: expected 1,073,741,824 or more"):
        convert(published["k2"], tmp_path / "out", memory=1000)
    with pytest.raises(ValueError, match="4 workers, process 2 of 2: expected"):
        convert(published["k2"], tmp_path / "out", process_index=2, num_processes=2)
    assert list(tmp_path.iterdir()) == []
