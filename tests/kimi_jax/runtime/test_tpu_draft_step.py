"""Drafts of published heads compiled for TPU meshes that this machine does not have: kernels under shard_map, the cache
updated in place, no weight moved."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)",
    ),
]
# The kernels of the first draft and of the loop over the others.
LATENT = ("mla_query", "mla_write", "mla_decode", "mla_output")
CASES = [
    ("K25_MLA_HEAD", "v6e:2x4", "1x1x8x1", 1, dict.fromkeys(LATENT, 2)),
    ("K25_LLAMA_HEAD", "v6e:2x4", "1x1x8x1", 1, {}),
    ("K3_HEAD", "v5p:2x2x2", "1x1x8x1", 4, dict.fromkeys(LATENT, 2)),
]


def test_drafts_of_published_heads():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    script = Path(__file__).parents[2] / "support" / "tpu_draft_step.py"
    arguments = [str(part) for case in CASES for part in case[:4]]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for (*_, kernels), found in zip(CASES, lines, strict=True):
        assert kernels.items() <= found["kernels"].items(), found
        assert found["largest"] < 2**21  # bytes: activations
        assert found["in place"] >= found["cache"], found
        assert found["temporary"] < 1e9 and found["arguments"] < 4e9, found
