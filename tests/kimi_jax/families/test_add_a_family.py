"""The family that docs/add-a-family.md adds, by the code in it, for every command that reads a checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import checkpoints
from checkpoints.published.quantization_config import int4
from checkpoints.published.safetensors import CheckpointError
from checkpoints.toy import published_tensors, toy_config
from kimi_jax import families
from kimi_jax.config_json import ConfigError, from_dict
from kimi_jax.families.chat import template_for

DOCUMENT = Path(__file__).parents[3] / "docs" / "add-a-family.md"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2}
KIMI_K2 = toy_config("k2", n_routed_experts=4, quantization_config=int4(), **SIZES)


@pytest.fixture
def lantern(monkeypatch: pytest.MonkeyPatch) -> families.Family:
    """Enters the document's family."""
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code[1], DOCUMENT, "exec"), names)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, names["LANTERN"]))
    return names["LANTERN"]


def config() -> dict[str, Any]:
    """Returns Kimi K2's toy in the spelling of the document."""
    inner = {"d_model" if key == "hidden_size" else key: value for key, value in KIMI_K2.items()}
    return {"architectures": ["LanternForConditionalGeneration"], "model_type": "lantern", "language_config": inner}


def published_name(name: str) -> str:
    """Returns the document's name for Kimi K2's, without the rules under test."""
    name = name.replace("model.layers.", "transformer.h.").replace("model.", "transformer.")
    return "text." + name.replace(".experts.", ".expert.")


def write(folder: Path, values: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def arrays(folder: Path) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.state(checkpoints.load(folder)))]


def test_a_checkpoint_of_the_new_family_is_read_converted_and_written_again(
    lantern: families.Family, tmp_path: Path
) -> None:
    tensors = dict(published_tensors(KIMI_K2))
    kimi_k2 = write(tmp_path / "kimi-k2", KIMI_K2, tensors)
    renamed = {published_name(name): tensor for name, tensor in tensors.items()}
    assert "text.transformer.h.1.mlp.expert.3.up_proj.weight_packed" in renamed
    folder = write(tmp_path / "lantern", config(), renamed)
    # the same numbers as Kimi K2's, from the release and once it is converted
    orbax = checkpoints.convert(folder, tmp_path / "orbax").destination
    assert arrays(folder) == arrays(kimi_k2) == arrays(orbax)
    assert not checkpoints.verify(orbax, folder).problems
    assert checkpoints.summary(folder).parts == checkpoints.summary(kimi_k2).parts
    # and again in its own names, its quantization_config with the language model's fields
    out = checkpoints.export(orbax, tmp_path / "out").destination
    written = {name: one for file in out.glob("*.safetensors") for name, one in load_file(file).items()}
    assert written.keys() == renamed.keys()
    assert json.loads((out / "config.json").read_text())["language_config"]["quantization_config"]
    # which chat template it has
    assert template_for(folder, checkpoints.load(folder, only=("lm_head",)).config) == "k2"


def test_its_configuration_is_kimi_k2_s(lantern: families.Family) -> None:
    found, kimi_k2 = from_dict(config()), from_dict(KIMI_K2)
    assert found.text == kimi_k2.text and found.vision is None
    assert (found.model_type, found.family, found.text.family) == ("lantern", "lantern", "k2")
    with pytest.raises(ConfigError, match=r"^config\.json: language_config: hidden_size 8 and d_model 64 contradict"):
        from_dict({**config(), "language_config": {"hidden_size": 8, **config()["language_config"]}})
    with pytest.raises(ConfigError, match=r"^config\.json: language_config is missing"):
        from_dict({"model_type": "lantern"})


def test_more_layers_or_experts_than_there_are_tensors(lantern: families.Family, tmp_path: Path) -> None:
    renamed = {published_name(name): tensor for name, tensor in published_tensors(KIMI_K2)}
    for field, value, kind in (("num_hidden_layers", 900, "2 layers"), ("n_routed_experts", 800, "4 experts")):
        values = config()
        values["language_config"][field] = value
        folder = write(tmp_path / field, values, renamed)
        with pytest.raises(CheckpointError, match=f"config.json has {field} {value}, but there are {kind}"):
            checkpoints.load(folder)


def test_without_it_the_release_is_unknown() -> None:
    with pytest.raises(
        ConfigError, match=r"model_type 'lantern' is none of kimi_k2, deepseek_v3, kimi_linear, kimi_k25"
    ):
        from_dict(config())
