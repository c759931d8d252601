"""Makes configs/*.json: the config.json that transformers saves after it has read a release's, and one of its own.

pip install -e .[oracle]
python tests/golden/make_configs.py
"""

import json
import tempfile
from importlib import resources
from pathlib import Path

import transformers
from cases import HERE

RELEASES = {
    "kimi-k2": transformers.DeepseekV3Config,
    "kimi-k2.5": transformers.Kimi_K25Config,
    "kimi-linear-48b": transformers.KimiLinearConfig,
}


def save(name: str, config: transformers.PreTrainedConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        (HERE / "configs" / f"{name}.json").write_text((Path(folder) / "config.json").read_text())


def main() -> None:
    for name, kind in RELEASES.items():
        preset = resources.files("kimi_jax") / "presets" / name / "config.json"
        values = json.loads(preset.read_text())
        if values["architectures"] == ["DeepseekV3ForCausalLM"]:  # transformers has no kimi_k2
            values["model_type"] = "deepseek_v3"
        save(name, kind.from_dict({key: value for key, value in values.items() if key != "_comment"}))
    save("kimi-linear-own", transformers.KimiLinearConfig(architectures=["KimiLinearForCausalLM"]))


if __name__ == "__main__":
    main()
