"""Reading published folders: the bytes that the safetensors library reads, and one clear error for every damage."""

import gzip
import json
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_oracle import read_all, same_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from checkpoints.published.safetensors import CheckpointError, Published

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
        (_truncate(0.0), rf"{SHARD}: is empty"),
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
        (_edit_header(lambda h: h[NORM].update(shape=[-128])), f"{SHARD}: tensor {NORM} has a header without"),
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
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header: gives the name 'x' twice"):
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


def _file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _x(shape: Any, offsets: Any, dtype: Any = "I8", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def _refusal(folder: Path, data: bytes) -> str:
    """Returns the line of the error, which names the file, or an empty text where the file is read."""
    (folder / "model.safetensors").write_bytes(data)
    try:
        Published.open(folder)
    except CheckpointError as error:
        assert str(error).startswith(f"{folder}/model.safetensors: ") and len(str(error)) < 1000
        return str(error)
    return ""


def _library(data: bytes) -> str:
    try:
        deserialize(data)
    except SafetensorError as error:
        return str(error)
    return ""


SOUND = {
    "two tensors": _file({"x": _x([2], [0, 2]), "y": _x([1, 1], [2, 3])}, b"abc"),
    "in any order": _file({"y": _x([1], [2, 3]), "x": _x([2], [0, 2])}, b"abc"),
    "nothing": _file({}),
    "a number alone": _file({"x": _x([], [0, 1])}, b"a"),
    "empty tensors between": _file(
        {"x": _x([2], [0, 2]), "b": _x([0, 7], [2, 2]), "a": _x([3, 0], [0, 0]), "y": _x([1], [2, 3])}, b"abc"
    ),
    "strings as metadata": _file({"__metadata__": {"format": "pt"}, "x": _x([1], [0, 1])}, b"a"),
    "no metadata": _file({"__metadata__": None, "x": _x([1], [0, 1])}, b"a"),
    "spaces after": _file(b"{}      "),
    "keys of its own": _file({"x": _x([1], [0, 1], note=[1.5])}, b"a"),
}
DAMAGED = {
    "a hole before": _file({"x": _x([1], [1, 2])}, b"ab"),
    "a hole between": _file({"x": _x([1], [0, 1]), "y": _x([1], [2, 3])}, b"abc"),
    "bytes after": _file({"x": _x([1], [0, 1])}, b"ab"),
    "bytes after no tensor": _file({}, b"a"),
    "an overlap": _file({"x": _x([2], [0, 2]), "y": _x([2], [1, 3])}, b"abc"),
    "the same bytes twice": _file({"x": _x([2], [0, 2]), "y": _x([2], [0, 2])}, b"ab"),
    "an empty tensor inside": _file({"x": _x([2], [0, 2]), "y": _x([0], [1, 1])}, b"ab"),
    "an empty tensor after": _file({"x": _x([2], [0, 2]), "y": _x([0], [3, 3])}, b"ab"),
    "a short file": _file({"x": _x([2], [0, 2])}, b"a"),
    "a float as shape": _file({"x": _x([1.0], [0, 1])}, b"a"),
    "true as shape": _file({"x": _x([True], [0, 1])}, b"a"),
    "a string as shape": _file({"x": _x("1", [0, 1])}, b"a"),
    "a float as offset": _file({"x": _x([1], [0.0, 1])}, b"a"),
    "false as offset": _file({"x": _x([1], [False, True])}, b"a"),
    "strings as offsets": _file({"x": _x([1], ["0", "1"])}, b"a"),
    "three offsets": _file({"x": _x([1], [0, 1, 1])}, b"a"),
    "offsets reversed": _file({"x": _x([1], [1, 0])}, b"a"),
    "negative": _file({"x": _x([-1, -1], [0, 1])}, b"a"),
    "negative offsets": _file({"x": _x([1], [-1, 0])}, b"a"),
    "more than 64 bits": _file({"x": _x([2**64], [0, 1])}, b"a"),
    "a product of 2**64": _file({"x": _x([2**32, 2**32], [0, 0])}),
    "a product that overflows before its zero": _file({"x": _x([2**63, 2, 0], [0, 0])}),
    "an infinite number": _file(b'{"x": {"dtype": "I8", "shape": [1e400], "data_offsets": [0, 1]}}', b"a"),
    "an unknown dtype": _file({"x": _x([1], [0, 1], "Q7")}, b"a"),
    "a list as dtype": _file({"x": _x([1], [0, 1], ["I8"])}, b"a"),
    "an entry of null": _file({"x": None}),
    "a key that is missing": _file({"x": {"dtype": "I8", "shape": [0]}}),
    "numbers as metadata": _file({"__metadata__": {"format": 1}}),
    "a list as metadata": _file({"__metadata__": ["pt"]}),
    "metadata twice": _file(b'{"__metadata__": {}, "__metadata__": {}}'),
    "a list": _file([]),
    "a list 9,999 deep": _file(b'{"x":' + b"[" * 9999 + b"]" * 9999 + b"}"),
    "UTF-16": _file("{}".encode("utf-16")),
    "not UTF-8": _file(b'{"\xff": 1}'),
    "a header without an end": _file(b'{"x": '),
    "seven bytes": b"\2\0\0\0\0\0\0",
    "a header longer than the file": struct.pack("<Q", 3) + b"{}",
    "a header of 2**64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
}
# The library accepts these.
STRICTER = {
    "a name twice": _file(b'{"x": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}, "x": '
                          b'{"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
    "a space before": _file(b" {}"),
    "a shape that NumPy has no arrays of": _file({"x": _x([1] * 65, [0, 1])}, b"a"),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_header_is_one_for_the_library_too(tmp_path: Path, case: str) -> None:
    assert (_refusal(tmp_path, SOUND[case]), _library(SOUND[case])) == ("", "")
    folder = Published.open(tmp_path)
    for name, found in deserialize(SOUND[case]):
        assert (list(folder.tensors[name].shape), folder.read(name).tobytes()) == (found["shape"], found["data"])


@pytest.mark.parametrize("case", DAMAGED)
def test_the_library_refuses_what_is_refused(tmp_path: Path, case: str) -> None:
    assert _library(DAMAGED[case]) and _refusal(tmp_path, DAMAGED[case])


@pytest.mark.parametrize("case", STRICTER)
def test_what_the_library_takes_and_is_refused(tmp_path: Path, case: str) -> None:
    assert not _library(STRICTER[case]) and _refusal(tmp_path, STRICTER[case])


_NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**32, 2**63, 2**64, 1.0, True, None, "1", [1]]))
_LISTS = st.one_of(st.lists(_NUMBERS, max_size=3), _NUMBERS)
_ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["I8", "I16", "BF16", 5]), "shape": _LISTS, "data_offsets": _LISTS}
    ),
    st.builds(lambda start, count: _x([count], [start, start + count]), st.integers(0, 4), st.integers(0, 4)),
    _LISTS,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["x", "y", "z", "__metadata__"]), _ENTRIES, max_size=3), st.integers(0, 9))
def test_no_header_is_taken_that_the_library_refuses(tmp_path: Path, header: Any, nbytes: int) -> None:
    data = _file(header, bytes(nbytes))
    if not _refusal(tmp_path, data):
        assert not _library(data)


KINDS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
    "a web page": b"\n<!DOCTYPE html><html>Not found</html>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "compressed with gzip": gzip.compress(b"{}", mtime=0),
    "a zip archive": b"PK\x03\x04\x14\0\0\0\0\0",
    "a Python pickle": pickle.dumps({"x": 1}),
    "in GGUF": b"GGUF\3\0\0\0" + bytes(100),
    "empty": b"",
    "zeros where it begins": bytes(1000),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_another_kind_of_file_is_called_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[kind])
    with pytest.raises(CheckpointError, match=rf"/{name}: is {kind}"):
        Published.open(tmp_path)
