"""A decode step compiled for TPU meshes that this machine does not have: kernels under shard_map, states updated in
place, no weight moved."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OF_A_MIXTURE = {"route": 1, "expert_visits": 1, "mixture": 1}
KERNELS = {
    "kimi-k2.5": {"mla_query": 2, "mla_write": 2, "mla_decode": 2, "mla_output": 2, **OF_A_MIXTURE},
    "kimi-linear-48b": {
        "kda_step": 1, "mla_query": 1, "mla_write": 1, "mla_decode": 1, "mla_output": 1, **OF_A_MIXTURE
    },
}  # fmt: skip
# Each layer's norms but the first follow a sum, and so does the last norm; four rows of eight fill no register.
NORMS = {"data=2,tensor=4": 2, "sequence=64": 4}
# The operations that are neither kernels nor messages, and of which the compiler expects some cycles.
SMALL = {
    ("kimi-k2.5", "sequence=64"): 48,
    ("kimi-k2.5", "data=2,tensor=4"): 56,
    ("kimi-linear-48b", "data=2,tensor=4"): 76,
}
# Each layer has two sums, the embeddings one; low ranks and queries are gathered, and partials merged by all-to-all.
QUICK = (
    ("kimi-linear-48b", "v5e:2x4", "data=2,tensor=4", 8, {"all-reduce": 5, "all-gather": 1}),
    # XLA gathers by sums over so many devices
    ("kimi-k2.5", "v6e:8x8", "sequence=64", 1, {"all-reduce": 5 + 2, "ragged-all-to-all": 2, "all-to-all": 2}),
)
SLOW = (("kimi-k2.5", "v5e:2x4", "data=2,tensor=4", 8, {"all-reduce": 5, "all-gather": 2}),)


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed (Linux x86-64 only)"
)


@pytest.fixture(scope="module")
def compiled():
    """Returns a function from cases to what is in the compiled step of each: two layers, one dense (of Kimi Linear: a
    KDA layer) and one mixture. They are compiled in one process of their own, without the flags of simulated
    devices."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
    script = Path(__file__).parents[2] / "support" / "tpu_decode_step.py"
    known = {}

    def steps(cases):
        if cases[0][:4] not in known:
            arguments = [str(part) for case in cases for part in case[:4]]
            done = subprocess.run(
                [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, check=False
            )
            assert done.returncode == 0, done.stderr
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            known.update(zip((case[:4] for case in cases), lines, strict=True))
        return known

    return steps


@pytest.mark.parametrize(
    ("preset", "slice_", "mesh", "batch", "messages"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[2]}", marks=[] if case in QUICK else [pytest.mark.slow])
        for case in QUICK + SLOW
    ],
)
def test_a_decode_step_compiles_for_a_tpu_mesh(compiled, preset, slice_, mesh, batch, messages):
    # Given the step of a preset on a mesh
    case = preset, slice_, mesh, batch
    found = compiled(QUICK if (*case, messages) in QUICK else SLOW)[case]
    # Then every op is its kernel, and other operations are few; messages are few and no larger than batch x hidden x 4,
    # and nothing is copied
    assert found["kernels"] == KERNELS[preset] | {"add_norm": NORMS[mesh]}
    assert 0 < found["small operations"] <= SMALL[preset, mesh]
    assert found["collectives"] == messages
    assert found["largest"] <= batch * 2048 * 4
    assert found["in place"] >= found["cache"]
    assert found["copies"] == []
    # And with all that a request can ask for the next tokens are chosen without a sort, from logits that stay sharded
    assert found["sorts"] == 0
    assert found["largest of choosing"] < batch * 2048 * 4 / (batch if mesh == "sequence=64" else 8)
