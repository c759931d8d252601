"""Makes saved.json: the tensors, and config.json, of folders that transformers' `save_pretrained` writes.

    pip install -e .[oracle]
    python tests/golden/saved_make.py

{"transformers": its version, "k2.5": {"original": [tensors, config], "own": [tensors, config]}, "k2": ..., ...}, where
`tensors` are shapes by name, "original" is the default, and "own" what `save_original_format=False` gives. The models
are the toys of `saved_config`, loaded from their published names.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import cases
import make
import torch
import transformers
from safetensors import safe_open

FAMILIES = ("k2.5", "k2", "kimi-linear")


def saved(name: str, original: bool) -> tuple[dict[str, list[int]], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        make.load(name, torch.float32).save_pretrained(folder, save_original_format=original)
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            tensors = {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}
        return tensors, json.loads((Path(folder) / "config.json").read_text())


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    cases.CASES = make.CASES = {name: cases.Toy(name, cases.SAVED[name]) for name in FAMILIES}
    values: dict[str, Any] = {"transformers": transformers.__version__}
    for name in FAMILIES:
        values[name] = {kind: saved(name, kind == "original") for kind in ("original", "own")}
    (cases.HERE / "saved.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")
