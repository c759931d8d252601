"""Summaries of checkpoints, against published totals and a count by the safetensors library."""

import dataclasses
import json
from pathlib import Path

import pytest
from checkpoint_oracle import read_all
from rich.console import Console

from checkpoints import Summary, summary, summary_of_config, summary_of_preset, table
from kimi_jax import config_json

QUICK = ("kimi-linear-48b", "kimi-k2.5", "kimi-k3")
# Tensors, weights and bytes of the files on Hugging Face: moonshotai/Kimi-Linear-48B-A3B-Instruct and Kimi-K2.5.
RELEASED = {"kimi-linear-48b": (20_493, 49.12e9, 98.2e9), "kimi-k2.5": (208_550, 1.027e12, 595e9)}


@pytest.mark.parametrize(
    "preset",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in config_json.preset_names()],
)
def test_the_sizes_beside_a_preset_are_those_of_its_model(preset: str) -> None:
    found = summary_of_config(config_json.preset(preset))
    assert summary_of_preset(preset) == found, json.dumps(dataclasses.asdict(found))


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_are_the_released_models(preset: str) -> None:
    tensors, parameters, nbytes = RELEASED[preset]
    found = summary_of_preset(preset)
    # each weight_packed, half of the tensors of INT4 experts, has a weight_shape beside it, which no summary counts
    packed = next(part.tensors for part in found.parts if part.name == "routed experts") // 2
    packed = packed if "int4" in found.dtypes else 0
    assert sum(part.tensors for part in found.parts) + packed == tensors
    assert found.parameters == pytest.approx(parameters, rel=1e-3)
    assert found.nbytes == pytest.approx(nbytes, rel=1e-2)


def test_kimi_k3_is_the_released_model_to_the_byte() -> None:
    found = summary_of_preset("kimi-k3")
    assert sum(part.tensors for part in found.parts) == 497_220
    assert (found.parameters, found.nbytes) == (2_779_931_837_184, 1_560_860_324_864)
    experts = next(part for part in found.parts if part.name == "routed experts")
    assert (experts.parameters, experts.nbytes) == (2_722_740_830_208, 1_446_456_066_048)


def parts(found: Summary) -> dict[str, tuple[int, int, int]]:
    return {part.name: (part.tensors, part.parameters, part.nbytes) for part in found.parts}


@pytest.mark.parametrize("like", ["k2.5", "k2", "kimi-linear"])
def test_toys_hold_what_the_library_counts(published: dict[str, Path], converted: dict[str, Path], like: str) -> None:
    tensors = {name: t for name, t in read_all(published[like]).items() if not name.endswith("weight_shape")}
    found = summary(published[like])
    assert found.kind == "safetensors"
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(part.tensors for part in found.parts) == len(tensors)
    assert found.parameters == sum(
        tensor.size * (8 if name.endswith("weight_packed") else 0 if name.endswith("weight_scale") else 1)
        for name, tensor in tensors.items()
    )
    marks = {"routed experts": ".experts.", "shared experts": ".shared_experts.", "vision": "vision_tower."}
    for part, mark in marks.items():
        nbytes = sum(tensor.nbytes for name, tensor in tensors.items() if mark in name)
        assert parts(found).get(part, (0, 0, 0))[2] == nbytes, part
    other = summary(converted[like])
    assert other.kind == "orbax"
    assert (parts(other), other.dtypes, other.layers) == (parts(found), found.dtypes, found.layers)


def test_parts_of_a_toy(published: dict[str, Path]) -> None:
    found = summary(published["k2.5"])
    experts = 8 * 3 * 64 * 128
    assert parts(found)["routed experts"] == (8 * 3 * 2, experts, experts // 2 + 2 * experts // 32)
    assert parts(found)["router"] == (2, 8 * 128 + 8, 2 * 8 * 128 + 4 * 8)
    assert parts(found)["embeddings"] == (2, 2 * 768 * 128, 4 * 768 * 128)
    assert parts(found)["dense mlp"] == (3, 3 * 96 * 128, 6 * 96 * 128)
    assert found.layers == {"mla + dense": 1, "mla + moe": 1}
    assert (found.model_type, found.vision_layers, found.n_routed_experts) == ("kimi_k25", 1, 8)
    assert found.dtypes == {
        "bfloat16": found.nbytes - experts // 2 - 4 * 8,
        "int4": experts // 2,
        "float32": 4 * 8,
    }


def test_layers_of_kimi_linear(published: dict[str, Path]) -> None:
    found = summary(published["kimi-linear"])
    assert found.layers == {"kda + dense": 1, "kda + moe": 1, "mla + moe": 1}
    assert found.vision_layers == 0


def test_table_shows_every_part_and_the_total(published: dict[str, Path]) -> None:
    found = summary(published["k2.5"])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(found))
    text = capture.get()
    title = "kimi_k25 (safetensors): 1 x mla + dense, 1 x mla + moe, 1 vision layers, 8 experts, 4 chosen"
    assert title in " ".join(text.split())
    for part in found.parts:
        line = next(line for line in text.splitlines() if line.startswith(f"│ {part.name} "))
        assert f"{part.parameters:,}" in line and f"{part.nbytes:,}" in line
    total = next(line for line in text.splitlines() if "total" in line)
    assert f"{found.parameters:,}" in total and f"{found.nbytes:,}" in total
