"""The engine's steps beside those of `generate`, compiled for TPU meshes that this machine does not have: scheduling
costs no time on a device."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.toy import toy_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)"
)
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "engine_compile.py"
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "n_routed_experts": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 512, "vocab_size": 2048,
}  # fmt: skip


def compiled(folder, *arguments):
    """Returns what the benchmark finds, by program and side. It runs in a process of its own, without the flags of
    simulated devices."""
    out = folder / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json", str(out)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: dict[str, dict[str, dict]] = {}
    for row in json.loads(out.read_text()):
        rows.setdefault(row.pop("program"), {})[row.pop("side")] = row
    return rows


def check_decode(ours, theirs):
    """Checks that the engine's step costs what `generate`'s does. Beside it, it has branches for penalties, masks and
    logprobs, which run where a row asks for them: the numbers count every branch."""
    assert ours["in_place"] == theirs["in_place"]
    for number in ("arguments", "hbm_bytes", "sent"):
        assert theirs[number] <= ours[number] <= 1.006 * theirs[number], number
    assert theirs["messages"] <= ours["messages"] <= theirs["messages"] + 7


@pytest.mark.slow
def test_a_decode_step_costs_what_that_of_generate_does(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(toy_config("k2", **SMALL)))
    mesh = ["--topology", "v5e:2x4", "--mesh", "data=2,tensor=4"]
    sizes = ["--slots", "8", "--tokens", "64", "--context", "512"]
    (step,) = compiled(tmp_path, "--model", str(tmp_path), *mesh, *sizes, "--only", "decode").values()
    ours, theirs = step["engine"], step["generate"]
    check_decode(ours, theirs)
    # two layers' pages, of 8 rows of 512 tokens over two devices, are updated in place
    assert ours["in_place"] >= 2 * 8 * 512 * 576 * 2 // 2
    assert ours["messages"] > 5 and ours["sent"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slice_", "mesh"),
    [("v6e:8x8", "data=8,tensor=8"), ("v6e:8x8", "data=8,sequence=8"), ("tpu7x:2x2x1", "sequence=8")],
)
def test_the_steps_of_k25(tmp_path, slice_, mesh):
    rows = compiled(tmp_path, "--topology", slice_, "--mesh", mesh)
    (decode,) = (sides for name, sides in rows.items() if name.startswith("decode"))
    check_decode(decode["engine"], decode["generate"])
    prefill, packed = (rows[name] for name in ("prefill, 512 tokens", "prefill, 512 tokens of several prompts"))
    ours, theirs = prefill["engine"], prefill["generate"]
    check_decode(ours, theirs)
    assert set(packed) == {"engine"}
