"""Names both ways, and every tensor of a folder accounted for by name, shape and dtype."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_oracle import BF16, read_all
from flax import nnx

from checkpoints.published.safetensors import CheckpointError, Published
from checkpoints.stored.names import contents, variable_path
from kimi_jax import config_json

FAMILIES = ["k2.5", "k2", "kimi-linear"]
EXPERT = "language_model.model.layers.1.mlp.experts.3"


def of(folder: Path) -> Any:
    return contents(config_json.from_folder(folder), Published.open(folder))


@pytest.mark.parametrize("like", FAMILIES)
def test_every_tensor_and_every_variable_once(published: dict[str, Path], like: str) -> None:
    found = of(published[like])
    names = [name for leaf in found.leaves for name in leaf.names]
    tensors = read_all(published[like])
    assert sorted(names) == sorted(name for name in tensors if not name.endswith("weight_shape"))
    variables = dict(nnx.to_flat_state(nnx.state(found.model)))
    assert sorted(map(str, variables)) == sorted(str(variable_path(leaf.path)) for leaf in found.leaves)
    for leaf in found.leaves:
        one = tensors[leaf.names[-1]]
        assert leaf.shape == ((len(leaf.names), *one.shape) if leaf.stacked else one.shape), leaf.path
        assert leaf.dtype == one.dtype and len(leaf.axes) == len(leaf.shape)


def test_names_of_the_published_tensors(published: dict[str, Path]) -> None:
    k25 = {leaf.path: leaf for leaf in of(published["k2.5"]).leaves}
    experts = k25["model.layers.1.mlp.experts.down_proj.weight_packed"]
    assert experts.names[5] == "language_model.model.layers.1.mlp.experts.5.down_proj.weight_packed"
    assert (experts.shape, experts.axes, experts.dtype) == ((8, 128, 8), ("expert", "embed", "expert_mlp"), np.int32)
    scales = k25["model.layers.1.mlp.experts.gate_proj.weight_scale"]
    assert (scales.shape, scales.axes, scales.dtype) == ((8, 64, 4), ("expert", "expert_mlp", "embed"), BF16)
    assert k25["lm_head.weight"].names == ("language_model.lm_head.weight",)
    assert k25["mm_projector.proj.2.weight"].names == ("mm_projector.proj.2.weight",)
    assert k25["model.layers.0.mlp.gate_proj.weight"].names == ("language_model.model.layers.0.mlp.gate_proj.weight",)
    linear = {leaf.path: leaf for leaf in of(published["kimi-linear"]).leaves}
    moe, tree = "model.layers.2.block_sparse_moe", "model.layers.2.mlp"
    for published_name, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        assert linear[f"{tree}.experts.{name}.weight"].names[7] == f"{moe}.experts.7.{published_name}.weight"
        assert linear[f"{tree}.shared_experts.{name}.weight"].names == (f"{moe}.shared_experts.{name}.weight",)
        assert linear[f"model.layers.0.mlp.{name}.weight"].names == (f"model.layers.0.mlp.{name}.weight",)
    assert linear[f"{tree}.gate.e_score_correction_bias"].names == (f"{moe}.gate.e_score_correction_bias",)
    assert linear["model.layers.0.self_attn.A_log"].shape == (1, 1, 8, 1)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


def _recast(name: str, dtype: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.__setitem__(name, tensors[name].astype(dtype))


def _keep(tensors: dict[str, Any]) -> None:
    """Changes nothing."""


@pytest.mark.parametrize(
    ("like", "change", "message"),
    [
        ("k2.5", lambda t: t.pop("mm_projector.proj.2.bias"), "1 tensors are missing: mm_projector.proj.2.bias$"),
        (
            "k2.5",
            lambda t: t.pop(f"{EXPERT}.up_proj.weight_scale"),
            f"1 tensors are missing: {EXPERT}.up_proj.weight_s",
        ),
        ("k2.5", lambda t: t.pop(f"{EXPERT}.up_proj.weight_shape"), f"missing: {EXPERT}.up_proj.weight_shape"),
        ("k2", lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight"), r"layers\.1\.mlp\.experts\.7\.up_proj"),
        ("k2.5", _set("model.odd", np.ones(2)), "1 tensors belong to no part of this model: model.odd"),
        ("k2", _set("model.layers.2.input_layernorm.weight", np.ones(2)), "no part of this model: model.layers.2"),
        (
            "k2",
            _set("model.norm.weight", np.ones(2, BF16)),
            r"tensor model.norm.weight has shape \[2\], expected \[128\]",
        ),
        (
            "k2",
            _recast("model.norm.weight", np.int32),
            "tensor model.norm.weight has dtype int32, expected bfloat16 or",
        ),
        (
            "k2.5",
            _set(f"{EXPERT}.up_proj.weight_shape", np.array([64, 120])),
            r"_shape says \[64, 120\], expected \[64, 128",
        ),
        ("k2.5", _set(f"{EXPERT}.up_proj.weight_shape", np.array([128, 64])), r"says \[128, 64\], expected \[64, 128"),
        (
            "k2.5",
            _recast(f"{EXPERT}.up_proj.weight_shape", np.int16),
            r"weight_shape is int16 \[2\], expected int32 or",
        ),
        (
            "k2.5",
            _set(f"{EXPERT}.down_proj.weight_scale", np.ones((128, 4), BF16)),  # groups of 16
            rf"tensor {EXPERT}.down_proj.weight_scale has shape \[128, 4\], expected \[128, 2\]",
        ),
        (
            "k2.5",
            _recast(f"{EXPERT}.down_proj.weight_scale", np.float32),
            "weight_scale has dtype float32, expected bf",
        ),
        (
            "k2.5",
            _recast(f"{EXPERT}.down_proj.weight_packed", np.int64),
            "weight_packed has dtype int64, expected int32",
        ),
        (
            "k2",
            _recast("model.layers.1.mlp.experts.7.up_proj.weight", np.float32),
            "7.up_proj.weight has dtype float32, b",
        ),
    ],
)
def test_what_does_not_fit_is_named(spoiled: Any, like: str, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        of(spoiled(like, change))
    assert "source" in str(error.value)


def test_only_the_first_names_are_listed(spoiled: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name and name.endswith("weight_scale")]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"24 tensors are missing: (\S+weight_scale, ){3}\.\.\.$"):
        of(spoiled("k2.5", change))


PROJECTION = "model.layers.0.self_attn.o_proj.weight"


def _to_fp8(tensors: dict[str, Any]) -> None:
    tensors[PROJECTION] = tensors[PROJECTION].astype(ml_dtypes.float8_e4m3fn)


def _scales(shape: tuple[int, ...], dtype: Any, change: Any = _to_fp8) -> Any:
    def spoil(tensors: dict[str, Any]) -> None:
        change(tensors)
        tensors[f"{PROJECTION}_scale_inv"] = np.ones(shape, dtype)

    return spoil


def test_fp8_goes_by_the_scales_that_are_there(spoiled: Any) -> None:
    leaves = {leaf.path: leaf for leaf in of(spoiled("k2", _scales((1, 2), np.float32))).leaves}
    weight, scales = leaves[PROJECTION], leaves[f"{PROJECTION}_scale_inv"]
    assert weight.dtype == ml_dtypes.float8_e4m3fn and weight.shape == (128, 192)
    assert scales.shape == (1, 2) and scales.names == (f"{PROJECTION}_scale_inv",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_to_fp8, rf"{PROJECTION} has dtype float8_e4m3fn, .*no weight_scale_inv lies beside it"),
        (_scales((1, 2), np.float32, lambda tensors: None), f"{PROJECTION} has dtype bfloat16, expected float8_e4m3fn"),
        (_scales((1, 1), np.float32), rf"{PROJECTION}_scale_inv has shape \[1, 1\], expected \[1, 2\]"),
        (_scales((1, 2), np.float16), rf"{PROJECTION}_scale_inv has dtype float16, expected float32"),
    ],
)
def test_fp8_that_does_not_fit_its_scales(spoiled: Any, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        of(spoiled("k2", change))


def test_weight_shapes_are_of_one_dtype(spoiled: Any) -> None:
    name = "language_model.model.layers.1.mlp.experts.5.up_proj.weight_shape"
    with pytest.raises(CheckpointError, match=rf"{name} has dtype int64, but \S+\.0\.up_proj\S+ has int32"):
        of(spoiled("k2.5", _set(name, np.array([64, 128], np.int64))))


def test_rotary_buffers_are_ignored(spoiled: Any, published: dict[str, Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    found = of(spoiled("k2", _set(name, np.ones(8, np.float32))))
    assert found.leaves == of(published["k2"]).leaves
    assert found.skipped == ()


def test_mtp_layers_are_left_out_with_a_notice(spoiled: Any, published: dict[str, Path]) -> None:
    extra = "model.layers.2.eh_proj.weight"
    folder = spoiled("k2", _set(extra, np.ones((2, 2), BF16)), num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match="1 tensors of MTP layers are left out"):
        found = of(folder)
    assert found.skipped == (extra,)
    assert found.leaves == of(published["k2"]).leaves


def test_weight_shape_of_either_width(spoiled: Any, published: dict[str, Path]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("weight_shape"):
                tensors[name] = tensors[name].astype(np.int64)

    assert of(spoiled("k2.5", change)).leaves == of(published["k2.5"]).leaves


def test_text_part_without_its_prefix(spoiled: Any, published: dict[str, Path]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("language_model.")] = tensors.pop(name)

    found, usual = of(spoiled("k2.5", change)), of(published["k2.5"])
    assert [leaf.path for leaf in found.leaves] == [leaf.path for leaf in usual.leaves]
    assert {name for leaf in found.leaves for name in leaf.names} == {
        name.removeprefix("language_model.") for leaf in usual.leaves for name in leaf.names
    }


def test_a_log_in_its_newer_shape(spoiled: Any) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("A_log"):
                tensors[name] = tensors[name].reshape(-1)

    shapes = {leaf.shape for leaf in of(spoiled("kimi-linear", change)).leaves if leaf.path.endswith("A_log")}
    assert shapes == {(8,)}


def test_the_form_goes_by_the_tensors_not_by_the_config(spoiled: Any, published: dict[str, Path]) -> None:
    quantization = json.loads((published["k2.5"] / "config.json").read_text())["text_config"]["quantization_config"]
    dense = of(spoiled("k2", _keep, quantization_config=quantization))
    assert dense.config.text.quantization is None
    assert dense.leaves == of(published["k2"]).leaves


def test_config_of_another_model(copy: Any, published: dict[str, Path]) -> None:
    folder = copy("kimi-linear")
    (folder / "config.json").write_bytes((published["k2"] / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"kimi-linear: \d+ tensors are missing: model\.layers"):
        of(folder)
