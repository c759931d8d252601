"""transformers loads the folders that `export` writes, whatever format they came in, and computes the same logits.

Needs the `oracle` extra. transformers' native classes spell some fields of config.json otherwise, so `make` translates
them first.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, HERE, config
from checkpoint_oracle import FORMS, read_all
from number_oracle import FP8, bf16, from_fp8

from checkpoints import convert, export
from checkpoints.toy import toy_config, write_toy

pytestmark = pytest.mark.slow


def transformers_logits(folder: Path, values: dict[str, Any]) -> Any:
    """Computes the logits, float64 [t, vocab_size], of tokens [t] by the safetensors in `folder` and config.json
    `values`."""
    make = pytest.importorskip("make", reason="needs the oracle extra: torch, transformers, compressed-tensors")
    import torch
    import transformers

    (folder / "config.json").write_text(json.dumps(values))
    model_class = getattr(transformers, values["architectures"][0].replace("KimiK25", "Kimi_K25"))
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **make.EAGER)
    assert not any(info.values()), info
    return make.runner(model.to(torch.float32).eval(), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_exported_toys_give_the_goldens(name: str, tmp_path: Path) -> None:
    make = pytest.importorskip("make", reason="needs the oracle extra: torch, transformers, compressed-tensors")
    case, golden = CASES[name], np.load(HERE / f"{name}.npz")
    source = write_toy(tmp_path / "toy", config(name), seed=case.seed)
    orbax = convert(source, tmp_path / "orbax", experts="bf16").destination
    export(orbax, tmp_path / "out", shard_bytes=1_000_000)
    logits = transformers_logits(tmp_path / "out", make.native_config(name))
    rows = zip(
        golden["text_tokens"], golden["text_lengths"], golden["text_positions"], golden["text_logits"], strict=True
    )
    for tokens, length, positions, right in rows:
        found = logits(tokens[:length])[positions]
        np.testing.assert_allclose(found, right, rtol=0, atol=make.REFERENCE_ERROR)


def test_int4_made_here_is_read_by_compressed_tensors(tmp_path: Path) -> None:
    """transformers unpacks the words by the quantization_config that `convert` wrote; its logits are bit for bit those
    of the checkpoint with bf16 experts."""
    pytest.importorskip("make", reason="needs the oracle extra: torch, transformers, compressed-tensors")
    import torch
    import transformers

    source = write_toy(tmp_path / "toy", toy_config("k2", num_hidden_layers=2, hidden_size=128))
    export(convert(source, tmp_path / "orbax-int4", experts="int4").destination, tmp_path / "int4")
    export(convert(tmp_path / "int4", tmp_path / "orbax-bf16", experts="bf16").destination, tmp_path / "bf16")
    logits = []
    for folder in (tmp_path / "int4", tmp_path / "bf16"):
        values = json.loads((folder / "config.json").read_text())
        assert ("quantization_config" in values) == (folder.name == "int4")
        (folder / "config.json").write_text(json.dumps(values | {"model_type": "deepseek_v3"}))
        model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model.eval()(torch.arange(20)[None]).logits.float())
    assert logits[1].std() > 0.5 and torch.equal(*logits)


def test_fp8_is_what_its_own_arithmetic_says(tmp_path: Path) -> None:
    """An FP8 toy, converted and exported in bf16, computes the logits of its weights read in float64."""
    from safetensors.numpy import save_file

    values = FORMS["fp8"] | {"model_type": "deepseek_v3"}
    values.pop("quantization_config")
    source = write_toy(tmp_path / "toy", FORMS["fp8"])
    export(convert(source, tmp_path / "orbax").destination, tmp_path / "out")
    tensors, read = read_all(source), tmp_path / "read"
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name in [name for name in plain if plain[name].dtype == FP8]:
        plain[name] = bf16(from_fp8(plain[name], tensors[f"{name}_scale_inv"])).astype(np.float32)
    read.mkdir()
    save_file(
        {name: tensor.astype(np.float32) for name, tensor in plain.items()},
        read / "model.safetensors",
        {"format": "pt"},
    )
    tokens = np.arange(40) * 11 % 500
    found, right = (transformers_logits(folder, values)(tokens) for folder in (tmp_path / "out", read))
    assert np.square(right).mean() > 0.1
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-6)
