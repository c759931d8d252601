"""A config.json that asks for more than the tensors hold is refused before anything is made for each layer."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_oracle import BF16

from checkpoints import convert
from checkpoints.published.safetensors import CheckpointError
from checkpoints.stored import names
from checkpoints.stored.source import open_source
from kimi_jax.config_json import ConfigError, from_folder


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part.update({name: value for name, value in values.items() if name in part})
    (folder / "config.json").write_text(json.dumps(config))


def read_contents(folder: Path) -> object:
    return open_source(folder).contents


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the abstract model fail the test: one takes a second, and one of a thousand layers more."""
    monkeypatch.setattr(names, "abstract", lambda *_: pytest.fail("made a model for sizes that are not there"))


TOO_MANY = [
    ("k2", {"num_hidden_layers": 1000}, "num_hidden_layers 1000, but there are 2 layers"),
    ("k2", {"num_hidden_layers": 3}, "num_hidden_layers 3, but there are 2 layers"),
    ("k2", {"n_routed_experts": 16384}, "n_routed_experts 16384, but there are 8 experts"),
    ("k2.5", {"vt_num_hidden_layers": 1024}, "vt_num_hidden_layers 1024, but there are"),
]


@pytest.mark.parametrize(("like", "values", "message"), TOO_MANY)
def test_more_than_the_published_tensors(copy: Any, no_model: None, like: str, values: Any, message: str) -> None:
    folder = copy(like)
    edit(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        read_contents(folder)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, folder.parent / "out")


@pytest.mark.parametrize(("like", "values", "message"), TOO_MANY)
def test_more_than_a_converted_checkpoint(
    converted: dict[str, Path], tmp_path: Path, no_model: None, like: str, values: Any, message: str
) -> None:
    folder = tmp_path / like
    folder.mkdir()
    for file in converted[like].glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    edit(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        read_contents(folder)


def test_tensors_of_experts_are_counted_over_all_layers(copy: Any, spoiled: Any, no_model: None) -> None:
    # Given a folder with a tensor for each of many layers, and one layer with many experts
    def change(tensors: dict[str, Any]) -> None:
        tensors.update({f"model.layers.{i}.input_layernorm.weight": np.ones(2, BF16) for i in range(2, 100)})

    folder = spoiled("k2", change, num_hidden_layers=100)
    with pytest.raises(CheckpointError, match="n_routed_experts of all layers 792, but there are 24 tensors of exp"):
        read_contents(folder)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_routed_experts", "hidden_size", "vocab_size"])
def test_a_thousand_million_is_refused_at_once(copy: Any, no_model: None, name: str) -> None:
    folder = copy("k2")
    edit(folder, **{name: 10**9})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for read in (read_contents, from_folder, lambda path: convert(path, folder.parent / "out")):
        with pytest.raises(ConfigError, match=f"{name} is 1000000000, expected"):
            read(folder)
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_layer_of_the_model_is_not_left_out_as_mtp(copy: Any) -> None:
    folder = copy("k2")
    edit(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"layer 1 has no eh_proj.weight, so it is no MTP layer; .*_layers 1$"):
        read_contents(folder)
