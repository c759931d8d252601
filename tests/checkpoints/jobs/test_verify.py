"""Two checkpoints compared, and one compared with its checksums: every difference is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_oracle import FORMS, read_all

from checkpoints import convert, export, load, verify
from checkpoints.jobs import compare
from checkpoints.published.safetensors import CheckpointError
from checkpoints.stored import chunk_grid, manifest
from checkpoints.toy import toy_config, write_toy

UP = "language_model.model.layers.1.mlp.experts.3.up_proj.weight_packed"
FAMILIES = ["k2.5", "k2", "kimi-linear"]


def problems(*args: Any, **kwargs: Any) -> dict[str, str]:
    return {finding.name: finding.problem for finding in verify(*args, **kwargs).problems}


@pytest.mark.parametrize("like", FAMILIES)
def test_what_was_converted_is_the_same(published: dict[str, Path], converted: dict[str, Path], like: str) -> None:
    tensors = read_all(published[like])
    for a, b in ((published, converted), (converted, published), (converted, converted)):
        verdict = verify(a[like], b[like])
        assert {finding.name for finding in verdict.findings} == tensors.keys() and not verdict.problems
    assert not verify(converted[like]).problems
    weights = verify(converted[like], published[like], tolerance=0.0).findings
    assert len(weights) == sum(not name.endswith(("weight_scale", "weight_shape")) for name in tensors)


def test_progress_counts_every_byte(published: dict[str, Path], converted: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    total = sum(tensor.nbytes for tensor in read_all(published["k2.5"]).values())
    verify(published["k2.5"], converted["k2.5"], progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("tolerance", [None, 0.0])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.experts.5.down_proj.weight"])
@pytest.mark.parametrize("small", [False, True])
def test_one_element_that_differs(
    published: dict[str, Path], spoiled: Any, name: str, small: bool, tolerance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The element is anywhere in a tensor, which is read whole or in blocks."""
    if small:
        monkeypatch.setattr(compare, "CHUNK_BYTES", 2_000)

    def change(tensors: dict[str, Any]) -> None:
        tensors[name][-1, -1] += tensors[name].dtype.type(0.25)

    found = problems(published["k2"], spoiled("k2", change), tolerance=tolerance)
    assert found.keys() == {name}
    elements = read_all(published["k2"])[name].size
    assert found[name].startswith(f"differs in 1 of {elements:,} elements" if tolerance is None else "is off by 0.")


def test_names_dtypes_and_shapes(published: dict[str, Path], spoiled: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["lm_head.weight"]
        tensors["model.extra"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(5, np.float32)

    other = spoiled("k2", change)
    assert problems(published["k2"], other) == {
        "lm_head.weight": "is not in B",
        "model.extra": "is not in A",
        "model.norm.weight": "is bfloat16 [128] in A, float32 [128] in B",
        "model.layers.0.input_layernorm.weight": "is bfloat16 [128] in A, float32 [5] in B",
    }
    # by value, a wider dtype makes no difference
    assert problems(published["k2"], other, tolerance=0.0).keys() == {
        "lm_head.weight", "model.extra", "model.layers.0.input_layernorm.weight"
    }  # fmt: skip


def test_forms_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT4 and FP8 differ from their sources by half a step of 7, or of e4m3, of a weight's largest; blocks of the
    comparison cut FP8's scales."""
    source = write_toy(tmp_path / "bf16", FORMS["bf16"])
    fp8 = convert(source, tmp_path / "fp8", experts="fp8").destination
    int4 = convert(source, tmp_path / "int4", experts="int4").destination
    monkeypatch.setattr(compare, "CHUNK_BYTES", 40_000)
    assert not problems(fp8, source, tolerance=1 / 16 / 1.75 + 0.005)
    assert problems(fp8, source, tolerance=0.01)
    assert not problems(int4, source, tolerance=1 / 14 + 0.005)
    found = verify(int4, source, tolerance=0.01)
    assert {finding.name for finding in found.problems} == {name for name in read_all(source) if ".experts." in name}
    for finding in found.problems:
        assert 0.05 < finding.max_error < 0.08 and 0.08 < finding.rms_error < 0.13
    # a conversion to bf16 has the values of its INT4 source to the last bit
    restored = convert(write_toy(tmp_path / "int4-in", FORMS["int4"]), tmp_path / "back", experts="bf16").destination
    assert not problems(tmp_path / "int4-in", restored, tolerance=0.0)


def test_nan_is_never_the_same(published: dict[str, Path], spoiled: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][3] = np.nan

    assert problems(published["k2"], spoiled("k2", change), tolerance=0.5) == {
        "model.norm.weight": "holds NaN or infinity"
    }


def test_a_log_of_either_shape(published: dict[str, Path], spoiled: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors |= {name: t.reshape(-1) for name, t in tensors.items() if name.endswith("A_log")}

    other = spoiled("kimi-linear", change)
    assert not problems(published["kimi-linear"], other, tolerance=0.0)
    assert set(problems(published["kimi-linear"], other)) == {f"model.layers.{i}.self_attn.A_log" for i in (0, 1)}


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, f"tensor {UP} is not what was converted: its checksum differs"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), f"bytes, expected .* it holds tensor {UP}"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), f"bytes, expected .* it holds tensor {UP}"),
        (lambda file: file.unlink(), f"is not there; it holds tensor {UP}"),
    ],
)
def test_damage_to_a_converted_checkpoint(
    converted: dict[str, Path], tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    """verify names the damage, and load does before anything is loaded."""
    folder = shutil.copytree(converted["k2.5"], tmp_path / "copy")
    (file,) = (folder / "model.layers.1.mlp.experts.up_proj.weight_packed").glob("c.3*")
    damage(file)
    found = problems(folder)
    assert found.keys() == {UP}
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder, verify=True)
    assert found[UP] == str(error.value) and str(file) in found[UP]


def test_load_verifies_what_is_whole(converted: dict[str, Path]) -> None:
    assert load(converted["k2"], verify=True).config.text.n_routed_experts == 8


def test_several_chunks_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 30_000)
    source = write_toy(tmp_path / "toy", FORMS["bf16"])
    folder = convert(source, tmp_path / "orbax").destination
    for size in (7_000, 100_000):
        monkeypatch.setattr(compare, "CHUNK_BYTES", size)
        assert not problems(source, folder)
    file = sorted((folder / "lm_head.weight").glob("c.*"))[3]
    _flip(file)
    assert problems(folder).keys() == problems(source, folder).keys() == {"lm_head.weight"}


def test_what_cannot_be_asked(published: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no kimi_manifest"):
        verify(published["k2"])
    with pytest.raises(FileNotFoundError, match="holds neither"):
        verify(converted["k2"], tmp_path)
    with pytest.raises(ValueError, match=r"tolerance 0\.1: expected a number from 0, and two checkpoints"):
        verify(converted["k2"], tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance nan"):
        verify(converted["k2"], published["k2"], tolerance=float("nan"))
    folder = shutil.copytree(converted["k2"], tmp_path / "copy")
    values = json.loads((folder / "kimi_manifest.json").read_text())
    (folder / "kimi_manifest.json").write_text(json.dumps(values))  # the same JSON, spaced otherwise
    with pytest.raises(CheckpointError, match=r"kimi_manifest\.json: is damaged: its checksum, of itself, differs"):
        verify(folder)


MANIFEST = "kimi_manifest.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a converted checkpoint of few bytes, in which the larger leaves have several chunks."""
    root = tmp_path_factory.mktemp("small")
    widths = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "vt_hidden_size": 32}
    config = toy_config("k2.5", num_hidden_layers=2, vt_num_hidden_layers=1, n_routed_experts=4, **widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_grid, "PART_BYTES", 512)
        return convert(write_toy(root / "toy", config), root / "orbax").destination


def seen(folder: Path) -> bool:
    """Says whether verify finds a difference."""
    try:
        return bool(verify(folder).problems)
    except CheckpointError:
        return True


@pytest.mark.parametrize("count", [30, pytest.param(250, marks=pytest.mark.slow)])
def test_a_flip_of_any_byte_is_seen(small: Path, tmp_path: Path, count: int) -> None:
    """The bytes are those of every file that is no chunk, in turn with those of chunks, half of them near an end."""
    folder = shutil.copytree(small, tmp_path / "copy")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chunks = [path for path in files if path.name.startswith("c.")]
    root = [path for path in files if path.parent == folder]
    zarr = [path for path in files if path.name == "zarr.json"]
    assert len(files) == len(chunks) + len(root) + len(zarr) and not seen(folder)
    random = np.random.default_rng(0)
    for number in range(count):
        group = (root, chunks, zarr, chunks)[number % 4]
        file = group[number // 4 % len(group)] if group is root else group[random.integers(len(group))]
        data = bytearray(file.read_bytes())
        place = random.integers(len(data) if number % 2 else min(256, len(data)))
        place = len(data) - 1 - place if number % 4 == 3 else place
        before, data[place] = data[place], data[place] ^ random.integers(1, 256)
        file.write_bytes(data)
        assert seen(folder), f"{file}, byte {place}: {before} -> {data[place]}"
        data[place] = before
        file.write_bytes(data)
    assert not seen(folder)


def test_the_index_of_a_cut_chunk(small: Path, tmp_path: Path) -> None:
    """Stock Orbax reads a cut chunk by its index; our reader does not use the index."""
    folder = shutil.copytree(small, tmp_path / "copy")
    leaf = folder / "model.layers.1.mlp.experts.down_proj.weight_packed"
    (codec,) = json.loads((leaf / "zarr.json").read_text())["codecs"]
    assert codec["name"] == "sharding_indexed"
    data = bytearray((leaf / "c.2.0.0").read_bytes())
    data[-16:-8], data[-32:-24] = data[-32:-24], data[-16:-8]  # two parts exchanged
    (leaf / "c.2.0.0").write_bytes(data)
    ((name, problem),) = problems(folder).items()
    assert name.endswith("experts.2.down_proj.weight_packed") and "its index of parts is damaged" in problem
    with pytest.raises(CheckpointError, match="its index of parts is damaged"):
        export(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (lambda d: (d / "config.json").write_text("{}"), "config.json", "is not what was converted"),
        (lambda d: (d / "tiktoken.model").unlink(), "tiktoken.model", "is not there"),
        (lambda d: (d / "_METADATA").write_bytes(b""), "_METADATA", "is not what was converted"),
        (lambda d: (d / "lm_head.weight" / "zarr.json").unlink(), "lm_head.weight/zarr.json", "is not there"),
        (lambda d: (d / "chat_template.jinja").write_text("x"), "chat_template.jinja", "is no part of the checkpoint"),
        (lambda d: (d / "lm_head.weight" / "c.9.0").write_text("x"), "lm_head.weight/c.9.0", "is no part of"),
    ],
)
def test_files_beside_the_arrays(small: Path, tmp_path: Path, damage: Any, name: str, message: str) -> None:
    """verify names the damage, and load does before anything is loaded; export copies no file that has changed."""
    folder = shutil.copytree(small, tmp_path / "copy")
    damage(folder)
    found = problems(folder)
    assert found.keys() == {name} and f"{folder / name}: {message}" in found[name]
    with pytest.raises(ValueError, match="config.json: " if name == "config.json" else message):
        load(folder, verify=True)
    if name in ("config.json", "tiktoken.model", "chat_template.jinja"):
        with pytest.raises(ValueError, match=f"{name}: (changed|model_type)"):
            export(folder, tmp_path / "out")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], *, older: bool) -> None:
    """Applies `change` to the manifest and renews the manifest's own checksum, or removes it as in an older version."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    if older:
        for key in ("format", "files", "sha256"):
            del values[key]
    (folder / MANIFEST).write_bytes(json.dumps(values).encode() if older else manifest.encode(values))


def exchange(values: dict[str, Any]) -> None:
    a, b = (values["leaves"][f"model.layers.{i}.input_layernorm.weight"] for i in (0, 1))
    a["published"], b["published"] = b["published"], a["published"]


EXPERTS = "model.layers.1.mlp.experts.up_proj.weight_packed"


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange, r"input_layernorm.weight is published as \S+1.input_layernorm.weight, expected \S+0.input_"),
        (lambda v: v["leaves"]["lm_head.weight"].update(published="\x1b[31m"), r"published as \\x1b\[31m, expected"),
        (lambda v: v["leaves"]["lm_head.weight"].update(published="{0:>2000000000}"), "expected a name with"),
        (lambda v: v["leaves"][EXPERTS].update(published="model.{}.{}"), "expected a name with"),
        (lambda v: v["leaves"][EXPERTS].update(weight_shape=[1, 8]), r"has weight_shape \(1, 8\), which does not fit"),
        (lambda v: v["leaves"][EXPERTS].update(weight_shape_dtype="object"), "weight_shape_dtype 'object', expected"),
        (lambda v: v["leaves"]["lm_head.weight"].update(sha256=[]), "lm_head.weight has 0 checksums, expected 1"),
        (lambda v: v["leaves"]["lm_head.weight"].update(sha256=[5]), "lm_head.weight has checksums that are none"),
        (lambda v: v["leaves"]["lm_head.weight"].update(chunk=[0, 0]), r"chunk \[0, 0\], expected numbers from 1"),
        (lambda v: v["leaves"]["lm_head.weight"].update(part=[7, 64]), "does not divide shape"),
        (lambda v: v["leaves"]["lm_head.weight"].update(dtype=[]), r"has dtype \[\], expected one of"),
        (lambda v: v["leaves"].update({"../x": v["leaves"].pop("lm_head.weight")}), "expected a leaf's path"),
        (lambda v: v["leaves"].pop("lm_head.weight"), "1 leaves are missing or not of this model: lm_head.weight"),
        (lambda v: v.update(leaves=[]), r"leaves is \[\], expected an object"),
        (lambda v: v.pop("leaves"), "it has no 'leaves'"),
        (lambda v: v.update(skipped=5), "skipped is 5, expected names"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is of an older version")
def test_a_manifest_that_no_conversion_writes(
    small: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str, older: bool
) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    rewrite(folder, change, older=older)
    for reader in (load, lambda folder: export(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=message):
            reader(folder)
    assert seen(folder) and not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_older_version(small: Path, tmp_path: Path) -> None:
    """The checkpoint is read, and verify names the files without checksums."""
    folder = shutil.copytree(small, tmp_path / "copy")
    rewrite(folder, lambda _: None, older=True)
    with pytest.warns(UserWarning, match=r"kimi_manifest\.json: is of an older version, so files besides arrays"):
        assert not verify(folder).problems
    assert not problems(folder, small)
    export(folder, tmp_path / "out")


def test_a_checkpoint_of_a_newer_version(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    rewrite(folder, lambda values: values.update(format=3), older=False)
    with pytest.raises(CheckpointError, match="has format 3, expected 2"):
        load(folder)
