"""Whatever stops an export or a toy's writer, and whenever: nothing looks whole that is not, no leftover is in the way,
and the result is as if nothing had happened. And what the disk or the process has too little of is said."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_oracle import CONFIGS, same_folders

from checkpoints import convert, export
from checkpoints.files import lock, new_folder
from checkpoints.published import shards
from checkpoints.published.shards import ShardWriter, TensorHeader
from checkpoints.toy import make_toy, toy_config

SHARD = 200_000
Usage = namedtuple("Usage", "total used free")


def stop_after(patch: pytest.MonkeyPatch, writes: int, error: BaseException) -> list[str]:
    """Makes the next writers of shards stop after so many blocks; the list has the names of those that they wrote."""
    write, written = ShardWriter.write, list[str]()

    def failing(self: ShardWriter, name: str, block: Any, row: int = 0) -> None:
        if len(written) == writes:
            raise error
        if name not in self.finished:
            written.append(name)
        write(self, name, block, row)

    patch.setattr(ShardWriter, "write", failing)
    return written


@pytest.fixture(scope="module")
def exported(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports K2.5 without a stop."""
    return export(converted["k2.5"], tmp_path_factory.mktemp("exported") / "out", shard_bytes=SHARD).destination


@pytest.fixture
def stopped(converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stops an export, as a kill would, and returns its destination. Of 124 blocks 110 are written: of nine shards at
    least six are begun, and three at most not finished."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 110, KeyboardInterrupt())
        export(converted["k2.5"], tmp_path / "out", shard_bytes=SHARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    return tmp_path / "out"


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(converted: dict[str, Path], exported: Path, tmp_path: Path, kills: int) -> None:
    driver = Path(__file__).with_name("killing.py")
    command = [sys.executable, driver, "export", converted["k2.5"], tmp_path / "out", str(kills), str(SHARD)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == kills
    assert same_folders(tmp_path / "out", exported)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "out"]
    # what an attempt loses is the shards that its two workers had begun
    assert counts["begun"] <= counts["total"] + kills * 3 * SHARD


def test_whole_shards_are_not_written_again(
    converted: dict[str, Path], exported: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sorted(stopped.with_name("out.partial").glob("*.safetensors"))
    before = [(file.name, file.stat().st_mtime_ns, file.stat().st_ino) for file in whole]
    assert len(before) >= 3
    progress: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        written = stop_after(patch, -1, KeyboardInterrupt())
        export(converted["k2.5"], stopped, shard_bytes=SHARD, progress=lambda *counts: progress.append(counts))
    assert same_folders(stopped, exported)
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert not {index[name] for name in written} & {name for name, _, _ in before}
    after = [(stopped / name).stat() for name, _, _ in before]
    assert [(stat.st_mtime_ns, stat.st_ino) for stat in after] == [(time, inode) for _, time, inode in before]
    assert progress[0][0] > progress[0][1] / 10 and progress[-1][0] == progress[-1][1]


def test_a_shard_that_is_not_what_it_should_be_is_written_again(
    converted: dict[str, Path], exported: Path, stopped: Path
) -> None:
    """Cut short, or of a version that would have put other tensors into it."""
    first, second, *_ = sorted(stopped.with_name("out.partial").glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    data = second.read_bytes()
    second.write_bytes(data.replace(b'"dtype"', b'"DTYPE"', 1))
    export(converted["k2.5"], stopped, shard_bytes=SHARD)
    assert same_folders(stopped, exported)


def test_another_export_starts_over(converted: dict[str, Path], stopped: Path, tmp_path: Path) -> None:
    """Exports with other shards, and another checkpoint."""
    partial, copy = stopped.with_name("out.partial"), tmp_path / "copy.partial"
    shutil.copytree(partial, copy)
    for source, size in (("k2.5", 2 * SHARD), ("k2", SHARD)):
        export(converted[source], stopped, shard_bytes=size)
        export(converted[source], tmp_path / "like", shard_bytes=size)
        assert same_folders(stopped, tmp_path / "like")
        for folder in (stopped, tmp_path / "like"):
            shutil.rmtree(folder)
        if copy.exists():
            copy.rename(partial)


@pytest.mark.parametrize("step", ["copy_companions", "fsync", "rename", "rmtree"])
def test_stopped_while_it_is_made_whole(
    converted: dict[str, Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
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
            patch.setattr(new_folder.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            module = sys.modules["checkpoints.jobs.export"] if step == "copy_companions" else new_folder
            patch.setattr(module, step, after(getattr(module, step)))
        with pytest.raises(KeyboardInterrupt):
            export(converted["k2.5"], tmp_path / "out", shard_bytes=SHARD)
    assert (tmp_path / "out").exists() == (step == "rmtree")
    report = export(converted["k2.5"], tmp_path / "out", shard_bytes=SHARD)
    assert same_folders(tmp_path / "out", exported)
    assert "config.json" in report.carried and report.shards + len(report.carried) + 1 == len(list(exported.iterdir()))
    with pytest.raises(FileExistsError, match="out: destination exists and is not empty"):
        export(converted["k2.5"], tmp_path / "out", shard_bytes=SHARD)


def test_of_two_at_once_the_second_is_refused(converted: dict[str, Path], exported: Path, stopped: Path) -> None:
    partial = stopped.with_name("out.partial")
    before = sorted(partial.rglob("*"))
    message = rf"out\.partial: another process is writing it: pid {os.getpid()} on "
    for size in (SHARD, 2 * SHARD):
        with (
            lock.hold_lock(partial / new_folder.STATE / "lock", "theirs"),
            pytest.raises(FileExistsError, match=message),
        ):
            export(converted["k2.5"], stopped, shard_bytes=size)
    assert sorted(partial.rglob("*")) == before
    export(converted["k2.5"], stopped, shard_bytes=SHARD)
    assert same_folders(stopped, exported)


def test_one_that_comes_while_the_first_gives_the_folder_its_name(
    converted: dict[str, Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for the destination and locking, the first finishes: the second changes nothing."""
    mkdir = Path.mkdir

    def late(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == new_folder.STATE and not (tmp_path / "out").exists():
            shutil.copytree(exported, tmp_path / "out")
        mkdir(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", late)
        with pytest.raises(FileExistsError, match="out: destination exists and is not empty"):
            export(converted["k2.5"], tmp_path / "out", shard_bytes=SHARD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and same_folders(tmp_path / "out", exported)


def test_a_folder_of_somebody_else_is_left_alone(converted: dict[str, Path], tmp_path: Path) -> None:
    for partial in (tmp_path / "out.partial", tmp_path / "elsewhere"):
        partial.mkdir()
        (partial / "note.txt").write_text("x")
    (tmp_path / "linked.partial").symlink_to(tmp_path / "elsewhere")
    for name in ("out", "linked"):
        with pytest.raises(
            FileExistsError, match=rf"{name}\.partial: is in the way, and not what an interrupted writer"
        ):
            export(converted["k2"], tmp_path / name)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["note.txt"]


def test_a_toy_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["kimi-linear"]
    make_toy(tmp_path / "like", config, shard_bytes=SHARD)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 50, KeyboardInterrupt())
        make_toy(tmp_path / "out", config, shard_bytes=SHARD)
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) >= 2
    with monkeypatch.context() as patch:
        written = stop_after(patch, -1, KeyboardInterrupt())
        make_toy(tmp_path / "out", config, shard_bytes=SHARD)
    assert "model.embed_tokens.weight" not in written and same_folders(tmp_path / "out", tmp_path / "like")
    # of another seed: from the beginning
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 50, KeyboardInterrupt())
        make_toy(tmp_path / "again", config, shard_bytes=SHARD, seed=1)
    make_toy(tmp_path / "again", config, shard_bytes=SHARD)
    assert same_folders(tmp_path / "again", tmp_path / "like")


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    headers = [[TensorHeader(f"t{i}", np.dtype(np.int16), (2, 3))] for i in range(150)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
    try:
        with ShardWriter(tmp_path, headers) as writer:
            for row in (1, 0):
                for i in range(150):
                    writer.write(f"t{i}", np.full((1, 3), i, np.int16), row)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list(tmp_path.glob("model-*-of-000150.safetensors"))) == 150


@pytest.mark.parametrize("command", ["export", "make_toy", "convert"])
def test_too_little_room_is_said_before_the_first_byte(
    published: dict[str, Path],
    converted: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1_000_000, 1_000_000))
    monkeypatch.setattr(shards, "_put", lambda *_: pytest.fail("a byte was written"))
    message = r"new/out\.partial: No space left on device: 1,\d{3},\d{3} bytes are to be written, 1,000,000 are free"
    with pytest.raises(OSError, match=message):
        if command == "export":
            export(converted["k2"], tmp_path / "new" / "out")
        elif command == "make_toy":
            make_toy(tmp_path / "new" / "out", CONFIGS["k2"])
        else:
            convert(published["k2"], tmp_path / "new" / "out")
    assert not list(tmp_path.rglob("*.safetensors*")) and not list(tmp_path.rglob("c*"))


def test_a_toy_that_no_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    message = r"No space left on device: 70,\d{3},\d{3},\d{3},\d{3} bytes are to be written, [\d,]+ are free"
    with pytest.raises(OSError, match=message):
        make_toy(tmp_path / "out", toy_config("k2", vocab_size=2**36))
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_still_to_be_written_needs_room(
    published: dict[str, Path],
    converted: dict[str, Path],
    exported: Path,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
    there = sum(file.stat().st_size for file in stopped.with_name("out.partial").glob("*.safetensors"))
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda _: Usage(whole, there, whole - there))
    export(converted["k2.5"], stopped, shard_bytes=SHARD)
    assert same_folders(stopped, exported)
    # each process of a conversion needs room for its share
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda _: Usage(10**9, 0, 900_000))
    for index in range(2):
        convert(published["k2"], stopped.with_name("orbax"), process_index=index, num_processes=2)
    # and a file system that knows of no size is not asked
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    new_folder.check_room(stopped, 10**15)
