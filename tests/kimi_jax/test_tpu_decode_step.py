"""A decode step on a TPU mesh, compiled without one: kernels under shard_map, the state in place, weights not moved."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)"
)
@pytest.mark.parametrize(
    "preset,kernels,gathers",
    [
        ("kimi-k2.5", {"mla_query": 2, "mla_write": 2, "mla_decode": 2, "mla_output": 2, "mixture": 1}, 2),
        (
            "kimi-linear-48b",
            {"kda_step": 1, "mla_query": 1, "mla_write": 1, "mla_decode": 1, "mla_output": 1, "mixture": 1},
            1,
        ),
    ],
)
def test_a_decode_step_compiles_for_a_tpu_mesh(preset, kernels, gathers):
    # Given a process of its own, without the flags of simulated devices
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

    # When two layers, one dense (of Kimi Linear: a KDA layer) and one mixture, are compiled for 2 x 4 cores of a v5e
    script = Path(__file__).with_name("tpu_decode_step.py")
    done = subprocess.run(
        [sys.executable, str(script), preset], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    # Then every op is its kernel, the embeddings take one message and each layer three, and nothing is copied
    assert found["kernels"] == kernels
    assert found["collectives"] == {"all-reduce": 1 + 2 * 2, "all-gather": gathers}
    assert found["in place"] >= found["state"]
    assert found["copies"] == []
