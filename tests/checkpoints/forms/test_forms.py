"""Every form in, every form out: the chunks that a recipe makes against derivations in float64, element by element."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_oracle import BF16, FORMS, in_tree, read_all, same_bytes
from flax import nnx
from number_oracle import FP8, bf16, codes_of, fp8_of, from_fp8, from_int4, int4_of

from checkpoints import convert, load
from checkpoints.forms.forms import Recipe, make_recipe
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.stored import chunk_grid
from checkpoints.stored.names import contents
from checkpoints.stored.orbax_metadata import nest
from checkpoints.toy import write_toy
from kimi_jax import config_json
from sharding import make_mesh

LINEARS = ("proj.weight", "proj_with_mqa.weight", "w1.weight", "w2.weight", "w3.weight")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Writes a published folder in every form, of widths that 128 does not divide."""
    root = tmp_path_factory.mktemp("forms")
    return {form: write_toy(root / form, config) for form, config in FORMS.items()}


def recipe_for(folder: Path, **asked: Any) -> tuple[Recipe, Published]:
    published = Published.open(folder)
    return make_recipe(published, contents(config_json.from_folder(folder), published), **asked), published


def made(recipe: Recipe, published: Published) -> dict[str, Any]:
    """Runs the tasks, each chunk once, and returns the tree that would be stored."""
    arrays = {leaf.path: np.zeros(leaf.shape, leaf.dtype) for leaf in recipe.leaves}
    cuts = {leaf.path: chunk_grid.chunk_grid(leaf) for leaf in recipe.leaves}
    seen = set()
    for task in recipe.tasks():
        reads = [published.read(rows.name, rows.start, rows.stop) for rows in task.reads]
        chunks = task.make(*reads)
        assert sum(a.nbytes for a in (*reads, *chunks)) <= task.nbytes
        for chunk, array in zip(task.makes, chunks, strict=True):
            cut = cuts[chunk.path]
            assert array.shape == cut.chunk and array.dtype == cut.dtype
            starts = np.multiply(cut.index(chunk.number), cut.chunk)
            place = tuple(slice(start, start + size) for start, size in zip(starts, cut.chunk, strict=True))
            arrays[chunk.path][place] = array
            assert (chunk.path, chunk.number) not in seen
            seen.add((chunk.path, chunk.number))
    assert len(seen) == sum(cut.chunks for cut in cuts.values())
    return nest(arrays)


def values(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns every weight by name, rounded to float32 and to bf16, both in float64."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_packed"):
            value = from_int4(codes_of(tensor), tensors[name.replace("_packed", "_scale")].astype(np.float64))
            result[name.removesuffix("_packed")] = (value, value)
        elif tensor.dtype == FP8:
            value = from_fp8(tensor, tensors[f"{name}_scale_inv"])
            result[name] = (value, bf16(value))
        elif not name.endswith(("_scale", "_shape", "_scale_inv")):
            value = tensor.astype(np.float64)
            result[name] = (value, bf16(value))
    return result


@pytest.mark.parametrize("experts", ["int4", "fp8", "bf16"])
@pytest.mark.parametrize("source", ["int4", "fp8", "bf16"])
def test_experts_in_every_form(
    sources: dict[str, Path], source: str, experts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 30_000)  # several chunks a leaf, which cut FP8 blocks
    tensors = read_all(sources[source])
    tree = made(*recipe_for(sources[source], experts=experts, dtype="bfloat16"))
    for name, (_, value) in values(tensors).items():
        stem = name.removesuffix(".weight")
        if ".experts." not in name:
            kept = tensors[name].dtype == np.float32
            assert same_bytes(in_tree(tree, name), tensors[name] if kept else value.astype(BF16)), name
        elif experts == "bf16":
            assert same_bytes(in_tree(tree, name), value.astype(BF16)), name
        elif experts == "int4":
            codes, scales = int4_of(value)
            np.testing.assert_array_equal(codes_of(in_tree(tree, f"{stem}.weight_packed")), codes, err_msg=name)
            assert same_bytes(in_tree(tree, f"{stem}.weight_scale"), scales.astype(BF16)), name
        elif source == "fp8":
            assert same_bytes(in_tree(tree, name), tensors[name]), name
            assert same_bytes(in_tree(tree, f"{name}_scale_inv"), tensors[f"{name}_scale_inv"]), name
        else:
            numbers, scales = fp8_of(value)
            assert same_bytes(in_tree(tree, name), numbers.astype(FP8)), name
            assert same_bytes(in_tree(tree, f"{name}_scale_inv"), scales.astype(np.float32)), name


def test_int4_words_are_found_again(sources: dict[str, Path]) -> None:
    """Quantising what INT4 reads as gives the published words: kept or through bf16, the result is the same."""
    tensors = read_all(sources["int4"])
    tree = made(*recipe_for(sources["int4"]))
    for name, tensor in tensors.items():
        if name.endswith(("_packed", "_scale")):
            assert same_bytes(in_tree(tree, name), tensor)
        if name.endswith("_packed"):
            scale = tensors[name.replace("_packed", "_scale")].astype(np.float64)
            codes, again = int4_of(from_int4(codes_of(tensor), scale))
            assert (codes == codes_of(tensor)).all() and (again == scale).all()


@pytest.mark.parametrize(("source", "asked"), [("int4", {}), ("bf16", {}), ("fp8", {"experts": "fp8"})])
def test_what_keeps_its_form_is_copied(sources: dict[str, Path], source: str, asked: Any) -> None:
    folder = sources[source]
    recipe, published = recipe_for(folder, **asked)
    tree = made(recipe, published)
    for name, tensor in read_all(folder).items():
        if not name.endswith("_shape"):
            assert same_bytes(in_tree(tree, name), tensor), name
    assert recipe.config is None


def test_fp8_becomes_bf16_unless_asked(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_grid, "CHUNK_BYTES", 30_000)
    recipe, published = recipe_for(sources["fp8"])
    tree = made(recipe, published)
    tensors = read_all(sources["fp8"])
    assert {name for name, tensor in tensors.items() if tensor.dtype == FP8} == {
        name for name in tensors if name.endswith(LINEARS)
    }
    for name, (_, value) in values(tensors).items():
        right = tensors[name] if tensors[name].dtype == np.float32 else value.astype(BF16)
        assert same_bytes(in_tree(tree, name), right), name
    assert recipe.config is not None
    assert "quantization_config" not in recipe.config(json.loads((sources["fp8"] / "config.json").read_text()))


def test_the_rest_in_float32(sources: dict[str, Path]) -> None:
    tree = made(*recipe_for(sources["fp8"], dtype="float32"))
    for name, (value, rounded) in values(read_all(sources["fp8"])).items():
        right = rounded.astype(BF16) if ".experts." in name else value.astype(np.float32)
        assert same_bytes(in_tree(tree, name), right), name


@pytest.mark.parametrize("source", ["int4", "fp8", "bf16"])
@pytest.mark.parametrize("experts", ["int4", "fp8", "bf16"])
def test_config_describes_the_result(sources: dict[str, Path], source: str, experts: Any) -> None:
    recipe, _ = recipe_for(sources[source], experts=experts, dtype="float32")
    assert recipe.config is not None
    config = recipe.config(json.loads((sources[source] / "config.json").read_text()))
    text = config.get("text_config", config)
    methods = {"int4": "compressed-tensors", "fp8": "fp8", "bf16": None}
    assert text.get("quantization_config", {}).get("quant_method") == methods[experts]
    assert text["dtype"] == config["dtype"] == "float32"
    assert (config_json.from_dict(config).text.quantization is not None) == (experts == "int4")
    if experts == "fp8":  # every other Linear is named, so that nobody looks for its scales
        plain = set(text["quantization_config"]["modules_to_not_convert"])
        linears = {name.removesuffix(".weight") for name in values(read_all(sources[source])) if name.endswith(LINEARS)}
        assert {name for name in linears if ".experts." not in name} <= plain
        assert not {name for name in linears if ".experts." in name} & plain


@pytest.mark.parametrize("experts", ["int4", "bf16"])
@pytest.mark.parametrize(
    ("source", "tensor"),
    [
        ("int4", "layers.1.mlp.experts.3.up_proj.weight_scale"),
        ("fp8", "layers.1.mlp.experts.3.up_proj.weight_scale_inv"),
    ],
)
def test_a_scale_that_is_not_finite(
    sources: dict[str, Path], tmp_path: Path, source: str, tensor: str, experts: Any
) -> None:
    folder = copy_of(sources[source], tmp_path)
    name = next(name for name in Published.open(folder).tensors if name.endswith(tensor))
    place = Published.open(folder).tensors[name]
    nan = np.array([np.nan], place.dtype)
    with place.file.open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(nan.tobytes())
    with pytest.raises(CheckpointError, match=rf"{place.file.name}: tensor {name} has a scale in row 0 that is"):
        made(*recipe_for(folder, experts=experts))


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_a_weight_that_is_not_finite_is_not_quantised(sources: dict[str, Path], tmp_path: Path, source: str) -> None:
    folder = copy_of(sources[source], tmp_path)
    name = next(name for name in Published.open(folder).tensors if "experts.2" in name and name.endswith("proj.weight"))
    place = Published.open(folder).tensors[name]
    with place.file.open("r+b") as stream:
        stream.seek(place.offset + place.nbytes - 2)
        stream.write(b"\xff\xff")
    with pytest.raises(CheckpointError, match=rf"{place.file.name}: tensor {name} holds NaN or infinity"):
        made(*recipe_for(folder, experts="int4"))


def test_experts_that_do_not_divide_into_groups(tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy", FORMS["bf16"] | {"moe_intermediate_size": 80})
    with pytest.raises(CheckpointError, match=r"experts\.\{\}\.down_proj\.weight has 80 inputs, which are no groups"):
        recipe_for(folder, experts="int4")


# --- converted and loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, {}, {"experts": "fp8"}, {"experts": "fp8", "dtype": "float32"}])
def test_fp8_is_loaded_as_bf16(sources: dict[str, Path], tmp_path: Path, asked: Any) -> None:
    """From the published folder, and from every checkpoint that is made of it; on a mesh too."""
    folder = sources["fp8"] if asked is None else convert(sources["fp8"], tmp_path / "out", **asked).destination
    right = values(read_all(sources["fp8"]))
    for mesh in (None, make_mesh("4x2")):
        found = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(load(folder, mesh)))}
        for name, (single, rounded) in right.items():
            keys = [int(key) if key.isdecimal() else key for key in name.split(".")]
            wide = name.endswith("bias") or (bool(asked) and "dtype" in asked and "experts" not in keys)
            value = single if wide else rounded
            if "experts" in keys:
                expert = keys.pop(keys.index("experts") + 1)
                np.testing.assert_array_equal(np.asarray(found[tuple(keys)][expert], np.float64), value, err_msg=name)
            elif name.endswith(LINEARS) or mesh is None:
                np.testing.assert_array_equal(np.asarray(found[tuple(keys)], np.float64), value, err_msg=name)


def test_a_model_quantised_here_is_loaded_as_int4(sources: dict[str, Path], tmp_path: Path) -> None:
    model = load(convert(sources["bf16"], tmp_path / "int4", experts="int4").destination)
    assert model.config.text.quantization is not None
    found = {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}
    for name, tensor in read_all(sources["bf16"]).items():
        if ".experts." in name:
            *path, expert, projection, _ = (int(key) if key.isdecimal() else key for key in name.split("."))
            codes, scales = int4_of(tensor)
            np.testing.assert_array_equal(np.asarray(found[*path, projection, "codes"][expert], np.float64), codes.T)
            np.testing.assert_array_equal(np.asarray(found[*path, projection, "scales"][expert], np.float64), scales.T)


def copy_of(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to
