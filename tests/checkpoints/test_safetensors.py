"""Reading published folders: the bytes of the safetensors library, and one clear error for every damage."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_oracle import read_all, same_bytes
from safetensors.numpy import save_file

from checkpoints.safetensors import CheckpointError, Published

NORM = "mm_projector.pre_norm.weight"
SHARD = "model-00003-of-000003.safetensors"


@pytest.mark.parametrize("like", ["k2.5", "kimi-linear"])
def test_reads_what_the_library_reads(published: dict[str, Path], like: str) -> None:
    folder, expected = Published.open(published[like]), read_all(published[like])
    assert folder.tensors.keys() == expected.keys()
    assert len(folder.files) == 3
    for name, array in expected.items():
        assert same_bytes(folder.read(name), array), name
        assert folder.tensors[name].nbytes == array.nbytes


def test_reads_rows_and_holds_no_more_than_them(tmp_path: Path) -> None:
    array = np.arange(4096 * 256, dtype=np.int32).reshape(4096, 256)
    save_file({"before": np.ones(3, np.int8), "x": array}, tmp_path / "model.safetensors")
    folder = Published.open(tmp_path)
    assert same_bytes(folder.read("x", 5, 9), array[5:9])
    assert same_bytes(folder.read("x", 4090), array[4090:])
    assert same_bytes(folder.read("x", 7, 7), array[7:7])
    tracemalloc.start()
    rows = folder.read("x", 100, 200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same_bytes(rows, array[100:200])
    assert peak < rows.nbytes + 20_000


def test_order_is_that_of_the_bytes(published: dict[str, Path]) -> None:
    tensors = list(Published.open(published["k2.5"]).tensors.values())
    assert [(t.file, t.offset) for t in tensors] == sorted((t.file, t.offset) for t in tensors)


def _edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def _edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def _truncate(keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(data[: int(keep * len(data))])

    return edit


def _duplicate(folder: Path) -> None:
    (folder / "model-00009-of-000003.safetensors").write_bytes((folder / SHARD).read_bytes())
    _edit_index(lambda m: m.update({"lm_head.other": "model-00009-of-000003.safetensors"}))(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate(0.9), rf"{SHARD}: truncated: tensor \S+ ends at byte \d+, the file at \d+"),
        (_truncate(0.0), rf"{SHARD}: truncated: 0 bytes"),
        (lambda folder: (folder / SHARD).write_bytes(b"\xff" * 100), rf"{SHARD}: truncated: 100 bytes cannot hold"),
        (lambda folder: (folder / SHARD).write_bytes(struct.pack("<Q", 9) + b"not JSON!"), f"{SHARD}: its header"),
        (lambda folder: (folder / SHARD).unlink(), rf"{SHARD}: shard is missing; \S+ places \d+ tensors in it"),
        (
            _edit_index(lambda m: m.update({"model.ghost": SHARD})),
            f"tensor model.ghost in {SHARD}, which does not hold",
        ),
        (_edit_index(lambda m: m.update({NORM: "model-00001-of-000003.safetensors"})), f"{NORM} in .* lies in {SHARD}"),
        (_edit_index(lambda m: m.pop(NORM)), f"{SHARD}: tensor {NORM} is not named by model.safetensors.index.json"),
        (_edit_index(lambda m: m.update({NORM: "../x"})), rf"{NORM} is placed in '\.\./x'"),
        (_edit_index(lambda m: m.clear()), "index.json: weight_map is missing or empty"),
        (_duplicate, rf"model-00009-of-000003.safetensors: tensor \S+ is also in {SHARD}"),
        (_edit_header(lambda h: h[NORM].update(dtype="Q7")), f"{SHARD}: tensor {NORM} has dtype 'Q7', expected one of"),
        (_edit_header(lambda h: h[NORM].update(shape=[3])), rf"tensor {NORM} of BF16 \[3\] .* expected 6 bytes"),
        (_edit_header(lambda h: h[NORM].update(shape=[-128])), f"{SHARD}: tensor {NORM} of BF16"),
        (_edit_header(lambda h: h[NORM].pop("data_offsets")), f"{SHARD}: tensor {NORM} has a header without"),
        (_edit_header(lambda h: h[NORM].update(data_offsets=[64, 256])), f"{SHARD}: tensors .* and .* overlap"),
    ],
)
def test_damage_is_named(copy: Callable[[str], Path], damage: Callable[[Path], Any], message: str) -> None:
    folder = copy("k2.5")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        Published.open(folder)
    assert str(folder) in str(error.value)


def test_a_name_twice_in_one_header(tmp_path: Path) -> None:
    entry = '"x": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}'
    text = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: names x twice"):
        Published.open(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"x": np.arange(1000)}, tmp_path / "model.safetensors")
    folder = Published.open(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match=f"ends inside tensor x, at byte {len(data) - 8}"):
        folder.read("x")


def test_fp8_is_read(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3).view(ml_dtypes.float8_e4m3fn)
    save_file({"x": array}, tmp_path / "model.safetensors")
    folder = Published.open(tmp_path)
    assert folder.tensors["x"].nbytes == 6
    assert same_bytes(folder.read("x"), array) and same_bytes(folder.read("x", 1, 2), array[1:])


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors\.index\.json nor model\.safetensor"):
        Published.open(tmp_path)
