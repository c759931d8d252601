"""The way back: every published byte, in files that the safetensors library reads, and nothing half-written."""

import errno
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_oracle import FORMS, read_all, same_bytes
from safetensors import safe_open

from checkpoints import convert, export, load
from checkpoints.published import shards
from checkpoints.published.safetensors import CheckpointError
from checkpoints.published.shards import ShardWriter, TensorHeader, split_into_shards
from checkpoints.stored import chunk_grid
from checkpoints.toy import write_toy
from kimi_jax import config_json

FAMILIES = ["k2.5", "k2", "kimi-linear", "k3"]


def assert_same_tensors(found: Path, expected: Path) -> None:
    left, right = read_all(found), read_all(expected)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert same_bytes(left[name], tensor), name


@pytest.mark.parametrize("like", FAMILIES)
def test_there_and_back_every_byte_is_the_same(
    published: dict[str, Path], converted: dict[str, Path], tmp_path: Path, like: str
) -> None:
    report = export(converted[like], tmp_path / "out", shard_bytes=400_000)
    assert_same_tensors(tmp_path / "out", published[like])
    tensors = read_all(published[like])
    assert (report.tensors, report.nbytes) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    for file in published[like].iterdir():
        if "safetensors" not in file.name:
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
            assert file.name in report.carried
    assert len(list((tmp_path / "out").iterdir())) == report.shards + 1 + len(report.carried)


def test_what_the_manifest_keeps(spoiled: Any, tmp_path: Path) -> None:
    """weight_shape of int64, as the library writes it, and A_log [h]; a single file in; several chunks a tensor."""

    def int64(tensors: dict[str, Any]) -> None:
        tensors |= {name: t.astype(np.int64) for name, t in tensors.items() if name.endswith("weight_shape")}

    def short(tensors: dict[str, Any]) -> None:
        tensors |= {name: t.reshape(-1) for name, t in tensors.items() if name.endswith("A_log")}

    for like, change in (("k2.5", int64), ("kimi-linear", short)):
        source = spoiled(like, change)
        export(convert(source, tmp_path / like).destination, tmp_path / f"{like}-out")
        assert_same_tensors(tmp_path / f"{like}-out", source)


def test_numbers_behind_the_last_head_come_back(spoiled: Any, tmp_path: Path) -> None:
    """K3's A_log is longer than its heads are many; a model has nothing of the rest."""

    def fill(tensors: dict[str, Any]) -> None:
        name = "language_model.model.layers.0.self_attn.A_log"
        tensors[name] = np.where(np.arange(8) < 4, tensors[name], 3.0).astype(np.float32)

    source = spoiled("k3", fill)
    orbax = convert(source, tmp_path / "orbax").destination
    export(orbax, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", source)
    decays = [load(folder, only=("model.layers.0",)).model.layers[0].self_attn.A_log[...] for folder in (source, orbax)]
    assert decays[0].shape == (4,) and (decays[0] == decays[1]).all()


def test_fp8_kept_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 30_000)
    source = write_toy(tmp_path / "fp8", FORMS["fp8"])
    export(convert(source, tmp_path / "orbax", experts="fp8").destination, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_int4_made_here_is_published_as_such(tmp_path: Path) -> None:
    """Names, the weight_shape that no source had, and a config.json that says what the tensors are."""
    source = write_toy(tmp_path / "bf16", FORMS["bf16"])
    export(convert(source, tmp_path / "orbax", experts="int4").destination, tmp_path / "out")
    tensors = read_all(tmp_path / "out")
    stem = "model.layers.1.mlp.experts.5.down_proj"
    assert f"{stem}.weight" not in tensors
    assert same_bytes(tensors[f"{stem}.weight_shape"], np.array([192, 160], np.int32))
    assert tensors[f"{stem}.weight_packed"].shape == (192, 20) and tensors[f"{stem}.weight_scale"].shape == (192, 5)
    assert config_json.from_folder(tmp_path / "out").text.quantization is not None


def test_shards_are_as_the_library_has_them(converted: dict[str, Path], tmp_path: Path) -> None:
    """Sizes, names, the index, metadata, alignment, and that the library's own reader takes them."""
    export(converted["k2.5"], tmp_path / "out", shard_bytes=300_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):06d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    held, total = {}, 0
    for file in files:
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        assert header.pop("__metadata__") == {"format": "pt"} and start % 8 == 0
        assert len(data) - start <= 300_000 or len(header) == 1
        total += len(data) - start
        for name, tensor in header.items():
            itemsize = {"BF16": 2, "F32": 4, "I32": 4}[tensor["dtype"]]
            assert tensor["data_offsets"][0] % itemsize == 0, name
        with safe_open(file, "np") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert index["weight_map"] == held and index["metadata"]["total_size"] == total


def test_memory_is_some_chunks_whatever_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's allocations, of all threads, whenever a chunk is written to one shard of 9 MB."""
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 100_000)
    source = write_toy(tmp_path / "in", FORMS["bf16"] | {"n_routed_experts": 48})
    convert(source, tmp_path / "orbax")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    write, of_numpy, held = ShardWriter.write, tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain), []

    def counting(writer: ShardWriter, *arguments: Any) -> None:
        held.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([of_numpy]).traces))
        write(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "write", counting)
    tracemalloc.start()
    report = export(tmp_path / "orbax", tmp_path / "out")
    tracemalloc.stop()
    assert report.shards == 1 and 50_000 < max(held) < 1_000_000 < size / 9


def test_a_flipped_byte_is_noticed(converted: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(converted["k2.5"], tmp_path / "copy")
    file = sorted((folder / "model.layers.1.mlp.experts.up_proj.weight_packed").glob("c.3*"))[0]
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    message = rf"{file.name}: tensor \S+\.experts\.3\.up_proj\.weight_packed is not what was converted"
    with pytest.raises(CheckpointError, match=message):
        export(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_full_disk_leaves_nothing(
    converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.pwrite, 0

    def pwrite(file: int, data: Any, offset: int) -> int:
        nonlocal written
        if written > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(data)
        return write(file, data, offset)

    monkeypatch.setattr(shards.os, "pwrite", pwrite)
    message = r"No space left on device: '.*out\.partial/model-00001-of-000001\.safetensors\.unfinished'"
    with pytest.raises(OSError, match=message):
        export(converted["k2"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_a_new_or_empty_folder_is_written(
    published: dict[str, Path], converted: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine: destination exists and is not empty"):
        export(converted["k2"], tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="holds no kimi_manifest"):
        export(published["k2"], tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    with pytest.raises(ValueError, match="memory of 1,000 bytes"):
        export(converted["k2"], tmp_path / "new", memory=1000)


def test_a_shard_holds_what_fits_or_one_tensor() -> None:
    headers = [TensorHeader(str(size), np.dtype(np.int8), (size,)) for size in (5, 5, 1, 30, 3, 7)]
    assert [[header.name for header in shard] for shard in split_into_shards(headers, 10)] == [
        ["5", "5"],
        ["1"],
        ["30"],
        ["3", "7"],
    ]


def test_a_tensor_that_is_not_written_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="8 bytes were not written"),
        ShardWriter(tmp_path, [[TensorHeader("x", np.dtype(np.int32), (2, 2))]]) as writer,
    ):
        writer.write("x", np.zeros((1, 2), np.int32), 1)
