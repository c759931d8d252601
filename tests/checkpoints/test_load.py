"""Loading: what the model holds is what was published, from either kind of checkpoint, on one device or on a mesh."""

import importlib
import json
import math
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_oracle import BF16, codes, read_all, same_bytes
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from checkpoints import CheckpointError, convert, load
from checkpoints.files.place import digest, read_into
from checkpoints.published.safetensors import Published
from checkpoints.stored import chunk_grid
from checkpoints.stored import source as source_module
from checkpoints.toy import toy_config, write_toy
from kimi_jax.model.kimi import Kimi
from sharding import make_mesh

FAMILIES = ["k2.5", "k2", "kimi-linear"]
FLOAT32 = ("A_log", "dt_bias", "e_score_correction_bias")
loading = importlib.import_module("checkpoints.loading")


def variables(model: Kimi) -> dict[tuple[Any, ...], jax.Array]:
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def expected(folder: Path) -> dict[tuple[Any, ...], np.ndarray]:
    """Derives the variables of the model in `folder` from the published layout: names are paths; experts are stacked
    and transposed to [in, out]; a word is eight codes; three small tensors are float32."""
    values: dict[tuple[Any, ...], Any] = {}
    for name, tensor in read_all(folder).items():
        *path, last = name.removeprefix("language_model.").replace("block_sparse_moe", "mlp").split(".")
        if last == "weight_shape":
            continue
        if last in FLOAT32:
            tensor = tensor.reshape(-1).astype(np.float32)
        key: list[Any] = [int(part) if part.isdecimal() else part for part in path]
        if "experts" not in key:
            values[(*key, last)] = tensor
            continue
        expert = key.pop(key.index("experts") + 1)
        key[-1] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(key[-1], key[-1])
        tree = {"weight_packed": "codes", "weight_scale": "scales"}.get(last, last)
        value = {"codes": codes, "scales": np.transpose, "weight": np.asarray}[tree](tensor)
        values.setdefault((*key, tree), {})[expert] = value
    return {
        path: np.stack([value[e] for e in range(len(value))]) if isinstance(value, dict) else value
        for path, value in values.items()
    }


@pytest.mark.parametrize("like", FAMILIES)
@pytest.mark.parametrize("kind", ["published", "converted"])
def test_holds_what_was_published(request: pytest.FixtureRequest, like: str, kind: str) -> None:
    folder = request.getfixturevalue(kind)[like]
    model = load(folder)
    found, right = variables(model), expected(request.getfixturevalue("published")[like])
    assert found.keys() == right.keys()
    for path, value in right.items():
        if path[-1] == "codes":
            assert found[path].dtype == jnp.int4
            np.testing.assert_array_equal(np.asarray(found[path]).astype(np.int8), value, err_msg=str(path))
        else:
            assert same_bytes(found[path], value), path
        assert found[path].devices() == {jax.devices()[0]}


def expected_spec(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the mesh axes over which the dimensions of a parameter are sharded, on a mesh of experts and tensors."""
    both, names = ("expert", "tensor"), [str(part) for part in path]
    if "experts" in names:
        return (both, None, None)
    if "vision_tower" in names or "mm_projector" in names or "norm" in names[-2] or "gate" in names:
        return ()
    if names[-2] in ("gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return (both,)
    if names[-2] in ("f_a_proj", "g_a_proj"):
        return ()
    if names[-2] in ("down_proj", "o_proj"):
        return (None, both if names[-2] == "down_proj" else "tensor")
    return ("tensor",)


@pytest.mark.parametrize("like", ["k2.5", "kimi-linear"])
def test_either_kind_lies_on_the_mesh_as_asked(
    published: dict[str, Path], converted: dict[str, Path], like: str
) -> None:
    mesh = make_mesh("1x2x4")
    alone = variables(load(published[like]))
    for folder in (published[like], converted[like]):
        found = variables(load(folder, mesh))
        assert found.keys() == alone.keys()
        for path, value in found.items():
            sharding = NamedSharding(mesh, PartitionSpec(*expected_spec(path)))
            assert value.sharding.is_equivalent_to(sharding, value.ndim), path
            assert value.dtype == alone[path].dtype
            np.testing.assert_array_equal(np.asarray(value), np.asarray(alone[path]), err_msg=str(path))


@pytest.mark.parametrize("kind", ["published", "converted"])
def test_float32(request: pytest.FixtureRequest, kind: str) -> None:
    right = expected(request.getfixturevalue("published")["k2.5"])
    for path, value in variables(load(request.getfixturevalue(kind)["k2.5"], dtype=jnp.float32)).items():
        kept = {"codes": jnp.int4, "scales": jnp.bfloat16}
        assert value.dtype == kept.get(path[-1], jnp.float32), path
        np.testing.assert_array_equal(np.asarray(value).astype(np.float32), right[path].astype(np.float32))


def test_bf16_keeps_in_float32_what_must_be(published: dict[str, Path]) -> None:
    for path, value in variables(load(published["kimi-linear"], dtype=jnp.bfloat16)).items():
        assert value.dtype == (jnp.float32 if path[-1] in FLOAT32 else jnp.bfloat16), path


def test_stored_float32_stays_float32(spoiled: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32) + np.float32(2**-20)

    folder = spoiled("k2", change)
    model = load(folder)
    assert same_bytes(model.lm_head.weight[...], read_all(folder)["lm_head.weight"])
    assert model.model.norm.weight[...].dtype == BF16


def test_small_batches_give_the_same(
    published: dict[str, Path], converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = variables(load(published["k2.5"]))
    held: list[int] = []
    batches = loading._batches

    def counting(leaves: Any) -> Any:
        for batch in batches(leaves):
            held.append(sum(leaf.nbytes for leaf in batch))
            yield batch

    monkeypatch.setattr(loading, "_batches", counting)
    monkeypatch.setattr(loading, "BATCH_BYTES", 20_000)
    largest = 2 * (384 * 384 + 384)  # the projector's first layer, more than a batch, goes alone
    for folder in (published["k2.5"], converted["k2.5"]):
        held.clear()
        found = variables(load(folder))
        assert max(held) == largest and len(held) > 20
        assert all(same_bytes(found[path], np.asarray(value)) for path, value in whole.items())


def test_replicas_do_not_read_twice(published: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that several devices hold, or some columns of, are read once."""
    tensors = Published.open(published["k2.5"]).tensors.values()
    counts = {tensor.file.name: np.zeros(tensor.file.stat().st_size, int) for tensor in tensors}
    expected = {name: np.zeros_like(count) for name, count in counts.items()}
    for tensor in tensors:
        if not tensor.name.endswith("weight_shape"):  # which tells nothing that is not known
            expected[tensor.file.name][tensor.offset : tensor.offset + tensor.nbytes] = 1

    def counting(file: Path, offset: int, into: memoryview) -> int:
        counts[file.name][offset : offset + len(into)] += 1
        return read_into(file, offset, into)

    monkeypatch.setattr(source_module, "read_into", counting)
    load(published["k2.5"], make_mesh("1x2x2x2"))
    assert all(np.array_equal(counts[name], expected[name]) for name in expected)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors\.index\.json nor"):
        load(tmp_path)


def test_experts_that_do_not_divide(tmp_path: Path) -> None:
    config = toy_config("k2", num_hidden_layers=2, n_routed_experts=6, moe_intermediate_size=6)
    folder = write_toy(tmp_path / "toy", config)
    with pytest.raises(ValueError, match="axis 'expert_mlp' of 6 does not divide by mesh axis 'expert' of 4"):
        load(folder, make_mesh("2x4"))


@pytest.mark.parametrize(
    ("like", "sizes", "message"),
    [
        # Matrices of two heads of 48 channels, and of two KDA heads, divide over four devices
        (
            "k2",
            {"num_attention_heads": 2, "num_key_value_heads": 2},
            "axis 'heads' of 2 does not divide by mesh axis 'tensor' of 4",
        ),
        ("kimi-linear", {}, "axis 'kda_heads' of 2 does not divide by mesh axis 'tensor' of 4"),
    ],
)
def test_heads_that_do_not_divide(tmp_path: Path, like: str, sizes: dict[str, int], message: str) -> None:
    config = toy_config(like, **sizes)
    if like == "kimi-linear":
        config["linear_attn_config"] = config["linear_attn_config"] | {"num_heads": 2}
    folder = write_toy(tmp_path / "toy", config)
    with pytest.raises(ValueError, match=message):
        load(folder, make_mesh("1x2x4"))


def test_a_checkpoint_of_another_model(converted: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(converted["k2"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"q_lora_rank": None}))
    with pytest.raises(CheckpointError, match=r"copy: \d+ leaves are missing or not of this model: model\.layers\.0"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1024}))
    with pytest.raises(CheckpointError, match=r"leaf \S+\.weight has shape \[768, 128\], expected \[1024, 128\]"):
        load(folder)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_a_damaged_orbax_checkpoint(converted: dict[str, Path], tmp_path: Path, damage: Any) -> None:
    folder = shutil.copytree(converted["k2"], tmp_path / "copy")
    damage(folder / "model.layers.1.mlp.experts.up_proj.weight" / "c.3.0.0")
    message = r"copy: leaf model\.layers\.1\.mlp\.experts\.up_proj\.weight is damaged or not there, in c\.3\.0\.0"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes read of a converted folder, by leaf."""
    counts: Counter[str] = Counter()

    def counting(file: Path, offset: int, into: memoryview) -> int:
        counts[file.parent.name] += len(into)
        return read_into(file, offset, into)

    monkeypatch.setattr(source_module, "read_into", counting)
    return counts


def test_every_byte_is_read_once(converted: dict[str, Path], bytes_read: Counter[str]) -> None:
    seen: list[tuple[int, int]] = []
    load(converted["k2.5"], make_mesh("2x4"), progress=lambda done, total: seen.append((done, total)))
    manifest = json.loads((converted["k2.5"] / "kimi_manifest.json").read_text())["leaves"]
    sizes = {path: math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for path, leaf in manifest.items()}
    assert bytes_read == sizes
    total = sum(sizes.values())
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) == len(sizes)


def test_parts_of_a_model(published: dict[str, Path], converted: dict[str, Path], bytes_read: Counter[str]) -> None:
    whole = variables(load(published["k2.5"]))
    bytes_read.clear()
    part = variables(load(converted["k2.5"], only=("model.layers.1.mlp", "lm_head")))
    for path, value in part.items():
        if path[:4] == ("model", "layers", 1, "mlp") or path[0] == "lm_head":
            assert same_bytes(value, np.asarray(whole[path])), path
        else:
            assert isinstance(value, jax.ShapeDtypeStruct) and value.shape == whole[path].shape
    assert {path.split(".", 3)[0] for path in bytes_read} == {"model", "lm_head"}
    assert all(path.startswith(("model.layers.1.mlp.", "lm_head.")) for path in bytes_read)
    with pytest.raises(ValueError, match=r"only='model\.layers\.7': the model has no such part"):
        load(converted["k2.5"], only=["model.layers.7"])


def test_text_without_vision(converted: dict[str, Path]) -> None:
    text, whole = load(converted["k2.5"], only=("model", "lm_head")), variables(load(converted["k2.5"]))
    assert text.config.vision is None and text.vision_tower is None and text.mm_projector is None
    part = variables(text)
    assert {path[0] for path in whole} - {path[0] for path in part} == {"vision_tower", "mm_projector"}
    assert all(same_bytes(value, np.asarray(whole[path])) for path, value in part.items())
    assert np.isfinite(text(jnp.arange(5, dtype=jnp.int32)[None])).all()


def test_behind_a_url(published: dict[str, Path], converted: dict[str, Path]) -> None:
    alone = variables(load(published["k2.5"]))
    memory = fsspec.filesystem("memory")
    try:
        for kind, folder in (("published", published["k2.5"]), ("converted", converted["k2.5"])):
            memory.put(f"{folder}/", f"/bucket/{kind}/", recursive=True)
            found = variables(load(f"memory://bucket/{kind}", make_mesh("2x4")))
            assert all(same_bytes(found[path], np.asarray(value)) for path, value in alone.items())
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("like", ["k2.5", "kimi-linear"])
def test_any_box_by_its_own_bytes(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_read: Counter[str], like: str
) -> None:
    """Parts cut along rows and columns, and boxes of tensor parallelism over 2, 4 and 8, and ones of no mesh."""
    monkeypatch.setattr(chunk_grid, "PART_BYTES", 64)
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 30_000)
    source = source_module.open_source(convert(published[like], tmp_path / "out").destination)
    plain = source_module.open_source(published[like])
    random = np.random.default_rng(0)
    for leaf in {(leaf.shape, leaf.axes, leaf.dtype): leaf for leaf in source.contents.leaves}.values():
        axis = next((i for i, name in enumerate(leaf.axes) if name not in (None, "embed", "expert")), 0)
        span = [(0, size) for size in leaf.shape]
        boxes = [tuple(tuple(sorted(random.integers(0, size + 1, 2).tolist())) for size in leaf.shape)]
        boxes = [box for box in boxes if all(start < stop for start, stop in box)]
        for split in (1, 2, 4, 8):
            if leaf.shape[axis] % split == 0:
                size = leaf.shape[axis] // split
                own = [list(span) for _ in range(split)]
                for i, box in enumerate(own):
                    box[axis] = (i * size, (i + 1) * size)
                bytes_read.clear()
                exact = [tuple(box) for box in own]
                _filled(source, leaf, exact)
                grid = source.manifest.leaves[leaf.path].grid
                cut = grid.part[axis] <= size or grid.verbatim
                assert not cut or bytes_read[leaf.path] == leaf.nbytes, (leaf.path, split)
                boxes += exact
        found, right = _filled(source, leaf, boxes), _filled(plain, leaf, boxes)
        for box in boxes:
            assert same_bytes(found[box], np.ascontiguousarray(right[box])), (leaf.path, box)


def _filled(source: Any, leaf: Any, boxes: Any) -> dict[Any, np.ndarray]:
    reads = source_module.plan_reads(source, leaf, set(boxes))
    for found in reads.ranges:
        reads.fill(found)
    return reads.arrays


def test_two_processes_read_half_each(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a mesh whose `data` axis parts the processes, which hold alike what is not split over it."""
    monkeypatch.setattr(chunk_grid, "PART_BYTES", 16)  # a toy's columns are shorter than a read is worth
    folder = convert(published["k2"], tmp_path / "fine").destination
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    driver = Path(__file__).parents[2] / "benchmarks" / "restoring.py"
    commands = [[sys.executable, driver, folder, str(process), "2x4", port] for process in range(2)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    total = sum(leaf.nbytes for leaf in source_module.open_source(folder).contents.leaves)
    for found in (first, second):
        assert sum(found["by_leaf"].values()) == total // 2
    model = variables(load(published["k2"], make_mesh("2x4")))
    right = {
        f"{path} {tuple(part.indices(size)[:2] for part, size in zip(shard.index, value.shape, strict=True))}": digest(
            np.asarray(shard.data)
        )
        for path, value in model.items()
        for shard in value.addressable_shards
    }
    assert first["shards"].keys() | second["shards"].keys() == right.keys()
    for found in (first, second):
        assert all(right[place] == sha256 for place, sha256 in found["shards"].items())
