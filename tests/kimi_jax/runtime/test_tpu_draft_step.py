"""Drafts of published heads, and verifications with them, compiled for TPU meshes that this machine does not have:
kernels under shard_map, the cache updated in place, no weight moved."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import eagle_cases
import pytest

from kimi_jax import config_json, plan
from kimi_jax.plan import analytic
from kimi_jax.plan.job import Drafting
from sharding import mesh_sizes
from sharding.topologies import topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)",
    ),
]
# The kernels of three drafts.
LATENT = ("mla_query", "mla_write", "mla_decode", "mla_output")
CASES = [
    ("K25_MLA_HEAD", "v6e:2x4", "1x1x8x1", 1, dict.fromkeys(LATENT, 3)),
    ("K25_LLAMA_HEAD", "v6e:2x4", "1x1x8x1", 1, dict.fromkeys(("mla_write", "mla_decode"), 3)),
    ("K3_HEAD", "v5p:2x2x2", "1x1x8x1", 4, dict.fromkeys(LATENT, 3)),
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


@pytest.mark.parametrize(
    ("name", "mesh"), [("K25_MLA_HEAD", "data=8,sequence=8"), ("K25_LLAMA_HEAD", "data=8,tensor=8")]
)
def test_a_verification_that_drafts(name, mesh):
    # Given three layers of K2.5, the outputs of which a head takes
    config = config_json.preset("kimi-k2.5")
    text = dataclasses.replace(config.text, num_hidden_layers=3)
    head = dataclasses.replace(config_json.eagle_from_dict(getattr(eagle_cases, name)), aux_layers=(0, 1, 2))
    config = dataclasses.replace(config, text=text, vision=None)
    job = plan.Job(config, topology("v6e:8x8"), mesh_sizes(mesh), "decode", 64, 8192, 4, Drafting(3, head))
    made, memory = plan.compiled(job), analytic.memory(job)
    # Then no weight moves, and no message has more than the stream of all rows, in float32
    assert made.moved == () and max(one.nbytes for one in made.collectives) <= 64 * 4 * 7168 * 4
    # and the cache, that of the head too, stays in place
    assert made.in_place >= memory.cache and made.arguments == pytest.approx(memory.weights + memory.cache, rel=0.03)
    assert made.temporaries < 1e8
    # and weights and cache of the head are read once a draft
    assert made.hbm_bytes <= 1.1 * analytic.hbm_bytes(job)
