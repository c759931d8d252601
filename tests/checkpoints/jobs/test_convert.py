"""Conversion: stock Orbax reads every published byte back, and a bad source leaves nothing."""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_oracle import in_tree, leaves, read_all, same_bytes, same_folders
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import CheckpointError, convert
from checkpoints.stored import chunk_grid
from checkpoints.toy import toy_config

FAMILIES = ["k2.5", "k2", "kimi-linear"]


@pytest.mark.parametrize("like", FAMILIES)
@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_stock_orbax_restores_every_byte(
    published: dict[str, Path], converted: dict[str, Path], like: str, checkpointer: Any
) -> None:
    tree = checkpointer().restore(converted[like])
    tensors = {name: t for name, t in read_all(published[like]).items() if not name.endswith("weight_shape")}
    for name, tensor in tensors.items():
        assert same_bytes(in_tree(tree, name), tensor), name
    assert sum(leaf.nbytes for leaf in leaves(tree)) == sum(tensor.nbytes for tensor in tensors.values())


def test_stock_orbax_restores_onto_a_mesh(converted: dict[str, Path]) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))
    with ocp.StandardCheckpointer() as checkpointer:
        whole = checkpointer.restore(converted["k2.5"])

        def target(path: Any, leaf: np.ndarray) -> jax.ShapeDtypeStruct:
            axes = (
                PartitionSpec("expert") if ".experts" in jax.tree_util.keystr(path, simple=True, separator=".") else ()
            )
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        targets = jax.tree_util.tree_map_with_path(target, whole)
        sharded = checkpointer.restore(converted["k2.5"], targets)
    words = sharded["model"]["layers"]["1"]["mlp"]["experts"]["up_proj"]["weight_packed"]
    assert words.addressable_shards[0].data.shape == (2, 64, 16)
    assert jax.tree.all(jax.tree.map(same_bytes, sharded, whole))


def test_a_chunk_is_one_expert_verbatim(published: dict[str, Path], converted: dict[str, Path]) -> None:
    tensors = read_all(published["k2.5"])
    for expert in range(8):
        for part in ("weight_packed", "weight_scale"):
            file = converted["k2.5"] / f"model.layers.1.mlp.experts.down_proj.{part}" / f"c.{expert}.0.0"
            tensor = tensors[f"language_model.model.layers.1.mlp.experts.{expert}.down_proj.{part}"]
            assert file.read_bytes() == tensor.tobytes()


def test_stock_orbax_reads_chunks_that_are_cut(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along rows, where the published bytes stay in their order, and along columns, where they do not."""
    monkeypatch.setattr(chunk_grid, "PART_BYTES", 512)
    convert(published["k2.5"], tmp_path / "out")
    tensors = read_all(published["k2.5"])
    for projection, axis in (("up_proj", 1), ("down_proj", 2)):
        leaf = tmp_path / "out" / f"model.layers.1.mlp.experts.{projection}.weight_packed"
        (codec,) = json.loads((leaf / "zarr.json").read_text())["codecs"]
        part = codec["configuration"]["chunk_shape"]
        whole = (1, *tensors[f"language_model.model.layers.1.mlp.experts.3.{projection}.weight_packed"].shape)
        assert [i for i in range(3) if part[i] != whole[i]] == [axis]
        file, tensor = (
            (leaf / "c.3.0.0").read_bytes(),
            tensors[f"language_model.{leaf.name.replace('.experts.', '.experts.3.')}"],
        )
        assert file.startswith(tensor.tobytes()) == (axis == 1)
    tree = ocp.StandardCheckpointer().restore(tmp_path / "out")
    for name, tensor in tensors.items():
        assert name.endswith("weight_shape") or same_bytes(in_tree(tree, name), tensor), name


def test_tensors_of_zeros_are_written(spoiled: Callable[..., Path], tmp_path: Path) -> None:
    """zarr leaves such chunks out unless told otherwise, and Orbax would then refuse to restore."""
    zeros = ("model.norm.weight", "model.layers.1.mlp.experts.5.up_proj.weight")

    def change(tensors: dict[str, Any]) -> None:
        tensors |= {name: np.zeros_like(tensors[name]) for name in zeros}

    tree = ocp.StandardCheckpointer().restore(convert(spoiled("k2", change), tmp_path / "out").destination)
    for name in zeros:
        assert not in_tree(tree, name).any()


def test_what_goes_along(published: dict[str, Path], tmp_path: Path) -> None:
    source, target = published["k2.5"], tmp_path / "new" / "out"
    seen: list[tuple[int, int]] = []
    report = convert(source, target, progress=lambda done, total: seen.append((done, total)))
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tiktoken.model"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not list(target.glob("*safetensors*")) and not list(target.glob(".*"))
    tensors = {name: t for name, t in read_all(source).items() if not name.endswith("weight_shape")}
    assert (report.tensors, report.skipped) == (len(tensors), ())
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert (report.whole, report.found_bytes, report.made_bytes) == (True, 0, total)
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_manifest_holds_what_the_arrays_do_not(published: dict[str, Path], converted: dict[str, Path]) -> None:
    manifest = json.loads((converted["k2.5"] / "kimi_manifest.json").read_text())
    assert manifest["model_type"] == "kimi_k25"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", manifest["kimi_jax"])
    sizes = {name: file["size"] for name, file in manifest["source"]["files"].items()}
    assert sizes == {f.name: f.stat().st_size for f in published["k2.5"].glob("*.safetensors")}
    tensors, pattern = (
        read_all(published["k2.5"]),
        "language_model.model.layers.1.mlp.experts.{}.down_proj.weight_packed",
    )
    assert manifest["leaves"]["model.layers.1.mlp.experts.down_proj.weight_packed"] == {
        "shape": [8, 128, 8],
        "dtype": "int32",
        "published": pattern,
        "weight_shape": [128, 64],
        "weight_shape_dtype": "int32",
        "chunk": [1, 128, 8],
        "part": [1, 128, 8],
        "sha256": [hashlib.sha256(tensors[pattern.format(e)].tobytes()).hexdigest() for e in range(8)],
    }
    linear = json.loads((converted["kimi-linear"] / "kimi_manifest.json").read_text())["leaves"]
    assert linear["model.layers.0.self_attn.A_log"]["shape"] == [1, 1, 8, 1]
    assert linear["model.layers.1.mlp.experts.up_proj.weight"]["published"].endswith("sparse_moe.experts.{}.w3.weight")


def test_large_leaves_are_chunked_by_rows(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 50_000)
    convert(published["k2"], tmp_path / "out")
    embeddings = tmp_path / "out" / "model.embed_tokens.weight"
    grid = json.loads((embeddings / "zarr.json").read_text())["chunk_grid"]
    assert grid["configuration"]["chunk_shape"] == [192, 128]  # 768 halved twice: 49,152 bytes of bf16
    assert len(list(embeddings.glob("c.*.0"))) == 4
    tree = ocp.StandardCheckpointer().restore(tmp_path / "out")
    assert same_bytes(tree["model"]["embed_tokens"]["weight"], read_all(published["k2"])["model.embed_tokens.weight"])


def _damage_shard(folder: Path) -> None:
    file = folder / "model-00002-of-000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _odd_group(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    quantization = config["text_config"]["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"]["group_size"] = 24
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_shard, r"model-00002-of-000003.safetensors: truncated: tensor \S+ ends"),
        (
            lambda folder: (folder / "model-00002-of-000003.safetensors").unlink(),
            "00002-of-000003.safetensors: shard is",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json: not found"),
        (_odd_group, "config.json: .*group_size is 24; only 32 is supported"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(toy_config("kimi-linear"))),
            "config.json has num_hidden_layers 6, but there are 2 layers",
        ),
    ],
)
def test_bad_sources_leave_nothing(copy: Callable[[str], Path], tmp_path: Path, damage: Any, message: str) -> None:
    source = copy("k2.5")
    damage(source)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out" / "checkpoint")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_scale_that_is_not_finite(spoiled: Callable[..., Path], tmp_path: Path) -> None:
    name = "language_model.model.layers.1.mlp.experts.5.up_proj.weight_scale"

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][3, 1] = np.nan

    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} has a scale in row 3 that is not finite"):
        convert(spoiled("k2.5", change), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()


def test_destination_of_something_else(published: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"out: destination exists, and is no checkpoint of ours"):
        convert(published["k2"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and list((tmp_path / "out").iterdir()) == []
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "theirs").write_text("x")
    with pytest.raises(FileExistsError, match=r"new\.partial: is in the way, and no conversion"):
        convert(published["k2"], tmp_path / "new")
    assert [path.name for path in (tmp_path / "new.partial").iterdir()] == ["theirs"]
    with pytest.raises(FileExistsError, match=r"k2\.5: destination exists, of another conversion: config was .*, is "):
        convert(published["k2"], converted["k2.5"])


def test_a_source_behind_a_url(published: dict[str, Path], converted: dict[str, Path], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(published["k2"]) + "/", "/bucket/k2/", recursive=True)
    try:
        convert("memory://bucket/k2", tmp_path / "out")
        assert same_folders(tmp_path / "out", converted["k2"])
    finally:
        memory.rm("/bucket", recursive=True)
    with pytest.raises(OSError, match="gs://bucket/k2: cannot be read here: Please install gcsfs"):
        convert("gs://bucket/k2", tmp_path / "other")


def test_links_within_the_folder_and_the_cache_of_the_hub(published: dict[str, Path], tmp_path: Path) -> None:
    """There a snapshot is links to the files of its repository, of which other snapshots have some too."""
    repository = tmp_path / "models--moonshotai--Kimi"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(published["k2"], repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / "LICENSE").symlink_to("config.json")
    folder = convert(snapshot, tmp_path / "out").destination
    for name in ("config.json", "tiktoken.model"):
        assert (folder / name).read_bytes() == (published["k2"] / name).read_bytes()
        assert not (folder / name).is_symlink()
    assert (folder / "LICENSE").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("LICENSE", lambda file: file.symlink_to("/etc/hostname"), "is a link to /etc/hostname, outside of the folder"),
        ("x.json", lambda file: file.symlink_to("../secret"), r"is a link to \S+/secret, outside of the folder"),
        ("x.py", lambda file: file.symlink_to("nothing"), r"is a link to \S+/nothing, which is not there"),
        ("tokenizer.json", os.mkfifo, "is no regular file"),
        ("x.model", lambda file: socket.socket(socket.AF_UNIX).bind(str(file)), "is no regular file"),
        ("x.jinja", lambda file: file.touch() or os.truncate(file, 2**40), r"has 1,099,511,627,776 bytes, expected at"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_may_not_go_along(
    published: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, make: Any, message: str
) -> None:
    source = shutil.copytree(published["k2"], tmp_path / "s")
    (tmp_path / "secret").write_text("x")
    monkeypatch.chdir(source)  # a socket's path has some 100 characters at most
    make(Path(name))
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_named_like_a_file_that_goes_along(published: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(published["k2"], tmp_path / "source")
    (source / "LICENSES").mkdir()
    (source / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}')
    folder = convert(source, tmp_path / "out").destination
    assert not (folder / "LICENSES").exists() and not (folder / "zarr.json").exists()
