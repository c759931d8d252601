"""Conversion: stock Orbax reads every published byte back, memory stays bounded, nothing half-written is left."""

import importlib
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_oracle import CONFIGS, in_tree, leaves, read_all, same_bytes
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import convert, progress_bar
from checkpoints.safetensors import Published
from checkpoints.toy import toy_config, write_toy

FAMILIES = ["k2.5", "k2", "kimi-linear"]
module = importlib.import_module("checkpoints.convert")  # the package's attribute of that name is the function


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
            file = converted["k2.5"] / f"model.layers.1.mlp.experts.down_proj.{part}" / f"c/{expert}/0/0"
            tensor = tensors[f"language_model.model.layers.1.mlp.experts.{expert}.down_proj.{part}"]
            assert file.read_bytes() == tensor.tobytes()


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
    with progress_bar() as bar:
        report = convert(source, target, progress=bar)
    carried = ("config.json", "generation_config.json", "preprocessor_config.json", "tiktoken.model")
    assert set(carried) <= set(report.carried)
    assert not any("safetensors" in name for name in report.carried)
    for name in report.carried:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    tensors = {name: t for name, t in read_all(source).items() if not name.endswith("weight_shape")}
    assert (report.tensors, report.skipped) == (len(tensors), ())
    assert report.read_bytes == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert report.written_bytes == sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    (task,) = bar.tasks
    assert task.completed == task.total == sum(tensor.nbytes for tensor in tensors.values())


def test_manifest_holds_what_the_arrays_do_not(published: dict[str, Path], converted: dict[str, Path]) -> None:
    manifest = json.loads((converted["k2.5"] / "kimi_manifest.json").read_text())
    assert manifest["model_type"] == "kimi_k25"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", manifest["kimi_jax"])
    assert manifest["files"] == {f.name: f.stat().st_size for f in published["k2.5"].glob("*.safetensors")}
    assert manifest["leaves"]["model.layers.1.mlp.experts.down_proj.weight_packed"] == {
        "shape": [8, 128, 8],
        "dtype": "int32",
        "published": "language_model.model.layers.1.mlp.experts.{}.down_proj.weight_packed",
        "weight_shape": [128, 64],
        "weight_shape_dtype": "int32",
    }
    linear = json.loads((converted["kimi-linear"] / "kimi_manifest.json").read_text())["leaves"]
    assert linear["model.layers.0.self_attn.A_log"]["shape"] == [1, 1, 8, 1]
    assert linear["model.layers.1.mlp.experts.up_proj.weight"]["published"].endswith("sparse_moe.experts.{}.w3.weight")


def test_large_leaves_are_chunked_by_rows(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 50_000)
    convert(published["k2"], tmp_path / "out")
    embeddings = tmp_path / "out" / "model.embed_tokens.weight"
    grid = json.loads((embeddings / "zarr.json").read_text())["chunk_grid"]
    assert grid["configuration"]["chunk_shape"] == [192, 128]  # 768 halved twice: 49,152 bytes of bf16
    assert len(list(embeddings.glob("c/*/0"))) == 4
    tree = ocp.StandardCheckpointer().restore(tmp_path / "out")
    assert same_bytes(tree["model"]["embed_tokens"]["weight"], read_all(published["k2"])["model.embed_tokens.weight"])


@pytest.mark.parametrize("experts", [8, 32])
def test_memory_does_not_grow_with_the_model(experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the bytes of arrays that were read and are still alive: one bound for 8 experts and for 32."""
    source = write_toy(tmp_path / "in", CONFIGS["k2"] | {"n_routed_experts": experts})
    live = peak = largest = 0
    read = Published.read

    def release(nbytes: int) -> None:
        nonlocal live
        live -= nbytes

    def counting(self: Published, *args: Any) -> np.ndarray:
        nonlocal live, peak, largest
        array = read(self, *args)
        live, largest = live + array.nbytes, max(largest, array.nbytes)
        peak = max(peak, live)
        weakref.finalize(array, release, array.nbytes)
        return array

    monkeypatch.setattr(Published, "read", counting)
    monkeypatch.setattr(module, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(module, "PENDING_BYTES", 80_000)
    report = convert(source, tmp_path / "out")
    assert largest <= 40_000
    # tensorstore lets go of a block a moment after its write is done, hence not 80,000 + 40,000 exactly
    assert largest < peak < 300_000 < report.read_bytes / 4


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
            r"\d+ tensors are missing: ",
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


@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyboardInterrupt()])
def test_an_interruption_leaves_nothing(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    read, calls = Published.read, 0

    def failing(self: Published, name: str, *args: Any) -> np.ndarray:
        nonlocal calls
        calls += not name.endswith("weight_shape")
        if calls == 60:
            assert (tmp_path / "checkpoint.partial").is_dir() and not (tmp_path / "checkpoint").exists()
            raise error
        return read(self, name, *args)

    monkeypatch.setattr(Published, "read", failing)
    with pytest.raises(type(error)):
        convert(published["k2.5"], tmp_path / "checkpoint")
    assert calls == 60
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_is_reported(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = module._create

    def in_the_way(leaf: Any, folder: Path) -> Any:
        array = create(leaf, folder)
        (folder / leaf.path / "c").write_text("a file where the chunks' folder belongs")
        return array

    monkeypatch.setattr(module, "_create", in_the_way)
    with pytest.raises(ValueError, match=r"checkpoint\.partial"):
        convert(published["k2"], tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_destination_exists(published: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match=r"out: destination exists"):
        convert(published["k2"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_two_writers_do_not_mix(published: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "theirs").write_text("x")
    with pytest.raises(FileExistsError, match=r"out\.partial: another conversion is writing it or was killed"):
        convert(published["k2"], tmp_path / "out")
    assert (tmp_path / "out.partial" / "theirs").exists() and not (tmp_path / "out").exists()
