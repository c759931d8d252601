"""MXFP4 experts from and to every form; published bytes are kept and exported, and a scale of 255 is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoint_oracle import read_all
from flax import nnx

from checkpoints import convert, export, load, publish
from checkpoints.published.quantization_config import describe_form, form_of
from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.toy import toy_config, write_toy
from kimi_jax import config_json
from pallas_kernels.formats import mxfp4
from sharding import make_mesh

PLAIN = toy_config("k2", quantization_config=None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4")
    return write_toy(folder / "published", describe_form(PLAIN, "mxfp4"))


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    return convert(source, source.parent / "converted").destination


def experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the numbers of the routed experts of MXFP4 or bf16, by the weight's name."""
    found = {}
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith("weight_packed"):
            scales = tensors[name.replace("packed", "scale")]
            found[name.removesuffix("_packed")] = mxfp4.dequantize(tensor, scales)
        elif ".experts." in name and name.endswith(".weight"):
            found[name] = tensor
    return found


def test_published_bytes_are_kept_and_given_back(source: Path, converted: Path) -> None:
    export(converted, source.parent / "exported")
    before, after = read_all(source), read_all(source.parent / "exported")
    assert before.keys() == after.keys()
    assert any(name.endswith("weight_packed") and tensor.dtype == np.uint8 for name, tensor in before.items())
    assert not any(name.endswith("weight_shape") for name in after)
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, source.parent / "exported")]
    assert configs[0] == configs[1] and form_of(configs[0]) == "mxfp4"


@pytest.mark.parametrize("where", ["published", "converted"])
@pytest.mark.parametrize("mesh", [None, "1x2x4"])
def test_a_model_of_either_folder_has_the_published_numbers(source: Path, converted: Path, where: str, mesh) -> None:
    model = load(source if where == "published" else converted, mesh and make_mesh(mesh))
    assert model.config.text.quantization.format == "mxfp4"
    state = {tuple(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))}
    for name, right in experts(read_all(source)).items():
        *path, number, projection, _ = name.split(".")
        codes, scales = (state[*path, projection, part][int(number)] for part in ("codes", "scales"))
        assert codes.dtype == scales.dtype == np.uint8
        found = mxfp4.dequantize(*(np.asarray(array).T for array in (codes, scales)))
        np.testing.assert_array_equal(found.astype(np.float64), right.astype(np.float64), err_msg=name)


def test_every_form_becomes_mxfp4_and_mxfp4_every_form(source: Path, tmp_path: Path) -> None:
    plain = write_toy(tmp_path / "bf16", PLAIN)
    made = convert(plain, tmp_path / "made", experts="mxfp4").destination
    assert config_json.from_folder(made).text.quantization.format == "mxfp4"
    export(made, tmp_path / "quantised")
    right = {name: mxfp4.dequantize(*mxfp4.quantize(value)) for name, value in experts(read_all(plain)).items()}
    found = experts(read_all(tmp_path / "quantised"))
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert value.tobytes() == found[name].tobytes(), name

    for form in ("int4", "fp8", "bf16"):
        there = convert(source, tmp_path / f"to {form}", experts=form).destination
        model = load(there)
        assert (model.config.text.quantization is None) == (form != "int4")
        if form == "bf16":  # which has every number of MXFP4
            export(there, tmp_path / "exported")
            plain_numbers, published = experts(read_all(tmp_path / "exported")), experts(read_all(source))
            assert all(published[name].tobytes() == value.tobytes() for name, value in plain_numbers.items())


def test_a_model_is_published_in_its_form(source: Path, converted: Path, tmp_path: Path) -> None:
    publish(load(converted), converted, tmp_path / "out", form="mxfp4")
    before, after = read_all(source), read_all(tmp_path / "out")
    assert {name: tensor.tobytes() for name, tensor in before.items()} == {
        name: tensor.tobytes() for name, tensor in after.items()
    }


@pytest.mark.parametrize("use", ["load", "convert", "bf16"])
def test_a_scale_of_255_is_refused(source: Path, tmp_path: Path, use: str) -> None:
    folder = write_toy(tmp_path / "bad", describe_form(PLAIN, "mxfp4"))
    name = next(name for name in Published.open(folder).tensors if name.endswith("experts.3.up_proj.weight_scale"))
    place = Published.open(folder).tensors[name]
    with place.file.open("r+b") as stream:
        stream.seek(place.offset + place.shape[1])
        stream.write(b"\xff")

    def run() -> Any:
        if use == "load":
            return load(folder)
        return convert(folder, tmp_path / "out", **({"experts": "bf16"} if use == "bf16" else {}))

    with pytest.raises(CheckpointError) as caught:
        run()
    message = str(caught.value)
    assert f"tensor {name} has a scale" in message and "255, which stands for NaN" in message and str(folder) in message
    assert "\n" not in message and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_forward_pass_reads_mxfp4(converted: Path) -> None:
    """The model gives what it gives with the same numbers in bf16."""
    dense = convert(converted.parent / "published", converted.parent / "dense", experts="bf16").destination
    ids = jax.numpy.asarray([[5, 6, 7, 8]], jax.numpy.int32)
    logits = [load(folder, dtype=np.float32)(ids) for folder in (converted, dense)]
    np.testing.assert_allclose(*(np.asarray(array) for array in logits), rtol=0, atol=1e-5)
