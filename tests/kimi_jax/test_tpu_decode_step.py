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
def test_a_decode_step_compiles_for_a_tpu_mesh():
    # Given a process of its own, without the flags of simulated devices
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}

    # When two layers of K2.5's kind, one dense and one mixture, are compiled for 2 x 4 cores of a v5e
    script = Path(__file__).with_name("tpu_decode_step.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    # Then every op is its kernel, the embeddings take one message and each layer three, and nothing is copied
    kernels = {"mla_write": 2, "mla_decode": 2, "int4_grouped_swiglu": 1, "int4_grouped_matmul": 1}
    assert found["kernels"] == kernels
    assert found["collectives"] == {"all-reduce": 1 + 2 * 2, "all-gather": 2}
    assert set(found["int4"]) <= {"parameter", "bitcast", "get-tuple-element"}
    assert (
        found["temporaries"] < 3 * 2**20
    )  # an eighth of the state's and the weights' bytes; what is prefetched counts
    assert found["in place"] >= found["state"] // 2
