"""Every command reads from a folder that transformers saved what it reads from the published one.

tests/golden/saved.json has the names and shapes that transformers wrote; here published toys are put in them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import HERE, SAVED
from checkpoint_oracle import same_bytes
from flax import nnx
from safetensors.numpy import save_file

import checkpoints
from checkpoints.published import spellings
from checkpoints.published.numerics import dequantize_int4
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.published.spellings import open_published
from checkpoints.toy import published_tensors, toy_config

Tensors = dict[str, np.ndarray]
GOLDEN = json.loads((HERE / "saved.json").read_text())
READ = [("k2.5", "original"), ("k2", "original"), ("k2", "own"), ("kimi-linear", "original"), ("kimi-linear", "own")]


def plain(like: str) -> Tensors:
    """Returns the toy's tensors under published names, in plain bf16 and float32."""
    tensors = dict(published_tensors(toy_config(like, **SAVED[like])))
    packed = [name for name in tensors if name.endswith("weight_packed")]
    for name in packed:
        scale = tensors.pop(name.replace("_packed", "_scale"))
        tensors.pop(name.replace("_packed", "_shape"))
        tensors[name.removesuffix("_packed")] = dequantize_int4(tensors.pop(name), scale)
    return tensors


def fused(tensors: Tensors, gate: str, up: str, down: str) -> Tensors:
    """Stacks all experts of a layer into one tensor, as the modules of transformers have them."""
    first = re.compile(rf"(.*\.experts)\.0\.{gate}\.weight")
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in filter(None, map(first.fullmatch, tensors)):
        w1, w3, w2 = (np.stack([tensors[f"{layer[1]}.{e}.{n}.weight"] for e in range(4)]) for n in (gate, up, down))
        result |= {f"{layer[1]}.gate_up_proj": np.concatenate([w1, w3], 1), f"{layer[1]}.down_proj": w2}
    return result


def renamed(tensors: Tensors, *renames: tuple[str, str]) -> Tensors:
    for pattern, replacement in renames:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def convolved(tensors: Tensors) -> Tensors:
    """Joins the three convolutions of a KDA layer into one tensor."""
    result = {name: tensor for name, tensor in tensors.items() if "_conv1d." not in name}
    for name in tensors:
        if ".q_conv1d." in name:
            parts = [tensors[name.replace("q_conv1d", f"{letter}_conv1d")] for letter in "qkv"]
            result[name.replace("q_conv1d", "conv1d")] = np.concatenate(parts)
    return result


SAVE: dict[tuple[str, str], Callable[[Tensors], Tensors]] = {
    ("k2.5", "original"): lambda tensors: renamed(
        tensors,
        (r"^language_model\.model\.layers", "language_model.model.blocks"),
        (r"^mm_projector\.pre_norm", "model.mm_projector.pre_norm"),
        (r"^vision_tower\.patch_embed\.proj", "vision_tower.encoder.patch_embed.proj"),
    ),
    ("k2", "original"): lambda tensors: tensors,
    ("k2", "own"): lambda tensors: fused(tensors, "gate_proj", "up_proj", "down_proj"),
    ("kimi-linear", "original"): lambda tensors: renamed(tensors, (r"\.mlp\.", ".block_sparse_moe.")),
    ("kimi-linear", "own"): lambda tensors: renamed(
        convolved(fused(tensors, "w1", "w3", "w2")),
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)", r".self_attn.forget_gate.\1"),
    ),
}


def write(folder: Path, tensors: Tensors, config: dict[str, Any], file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=READ, ids="-".join)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Returns a published folder, and the folder that transformers saves of it: the same config.json, other tensors."""
    like, kind = request.param
    tensors = plain(like)
    saved = SAVE[like, kind](tensors)
    shapes, _ = GOLDEN[like][kind]
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == shapes
    config = toy_config(like, **SAVED[like] | ({"quantization_config": None} if like == "k2.5" else {}))
    return write(tmp_path / "published", tensors, config), write(tmp_path / "saved", saved, config)


def test_every_reader_finds_what_is_published(folders: tuple[Path, Path], tmp_path: Path) -> None:
    published, saved = folders
    # inspect
    assert checkpoints.summary(saved) == checkpoints.summary(published)
    # load, bit for bit
    arrays = [jax.tree.leaves(nnx.state(checkpoints.load(folder))) for folder in (saved, published)]
    assert all(same_bytes(one, np.asarray(other)) for one, other in zip(*arrays, strict=True))
    # convert, and verify against either
    orbax = checkpoints.convert(saved, tmp_path / "orbax").destination
    for folder in (saved, published):
        assert not checkpoints.verify(orbax, folder).problems and not checkpoints.verify(folder, orbax).problems
    # export writes published names
    out = checkpoints.export(orbax, tmp_path / "out").destination
    assert Published.open(out).tensors.keys() == Published.open(published).tensors.keys()
    assert not checkpoints.verify(out, published).problems


def test_parts_are_read_where_they_are(tmp_path: Path) -> None:
    """An expert's part is read alone: every other tensor is cut off the file."""
    saved = SAVE["k2", "own"](plain("k2"))
    folder = open_published(write(tmp_path / "saved", saved, {}))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensor = folder.tensors[name]
    right = saved["model.layers.1.mlp.experts.gate_up_proj"][2, 32:]
    np.testing.assert_array_equal(folder.read(name), right)
    np.testing.assert_array_equal(folder.read(name, 3, 7), right[3:7])
    data = (folder.folder / "model.safetensors").read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert data == right.tobytes()


def test_fused_in_an_otherwise_published_folder(tmp_path: Path) -> None:
    """Fused experts have Kimi Linear's published names in one folder, and in the other K2.5's prefix."""
    linear = fused(plain("kimi-linear"), "w1", "w3", "w2")
    assert open_published(write(tmp_path / "linear", linear, {})).tensors.keys() == plain("kimi-linear").keys()
    k25 = fused(plain("k2.5"), "gate_proj", "up_proj", "down_proj")
    assert open_published(write(tmp_path / "k25", k25, {})).tensors.keys() == plain("k2.5").keys()


def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, _ = GOLDEN["k2.5"]["own"]
    saved = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=r"k25: has tensors under the names of .*save_original_format=True"):
        open_published(write(tmp_path / "k25", saved, {}))
    experts = SAVE["k2", "own"](plain("k2"))
    gate, down = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    changes: list[tuple[Tensors, str]] = [
        ({f"{gate}_scale_inv": np.ones((4, 1, 1), np.float32)}, r"gate_up_proj_scale_inv is of .* fused .*, quantised"),
        ({gate: experts[gate].astype(np.int8)}, r"experts\.gate_up_proj is of .* fused experts, quantised; only bfl"),
        ({gate: experts[gate][:, 1:]}, r"gate_up_proj has shape \[4, 63, 64\], expected \[experts, 2 \* moe_interm"),
        ({down: experts[down][0]}, r"down_proj has shape \[64, 32\], expected \[experts, hidden_size, moe_interm"),
        ({down: experts[down][:, :, :0]}, r"down_proj has shape \[4, 64, 0\], expected"),
        ({f"{gate[:-12]}1.up_proj.weight": experts[gate][0]}, r"tensor \S+ stands for \S+\.1\.up_proj\.weight, which"),
        ({f"{down}\x1b[2J": experts[down]}, r"down_proj\\x1b\[2J is of a layer's fused experts"),
    ]
    for number, (change, message) in enumerate(changes):
        with pytest.raises(CheckpointError, match=message):
            open_published(write(tmp_path / str(number), experts | change, {}))
    monkeypatch.setattr(spellings, "_MOST_EXPERTS", 3)
    with pytest.raises(CheckpointError, match=r"has shape \[4, 64, 32\], expected \[experts, "):
        open_published(write(tmp_path / "many", experts, {}))


def test_one_file_of_another_name(tmp_path: Path) -> None:
    tensors = {"x": np.arange(3, dtype=np.float32)}
    for number, name in enumerate(
        ("model-00001-of-00001.safetensors", "model-00001-of-000001.safetensors", "a.safetensors")
    ):
        folder = write(tmp_path / str(number), tensors, {}, name)
        assert Published.open(folder).tensors.keys() == {"x"}
    # the usual name is preferred to that of an adapter or of a copy
    save_file({"y": tensors["x"]}, folder / "model.safetensors")
    assert Published.open(folder).tensors.keys() == {"y"}
    for number, names in enumerate((["model-00002-of-00002"], ["model-00001-of-00002"], ["a", "b"])):
        folder = tmp_path / f"several{number}"
        folder.mkdir()
        for name in names:
            save_file(tensors, folder / f"{name}.safetensors")
        with pytest.raises(
            CheckpointError, match=rf"several{number}: model\.safetensors\.index\.json is missing, .*{names[0]}"
        ):
            Published.open(folder)
