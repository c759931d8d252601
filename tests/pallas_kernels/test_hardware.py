"""The table of chips against JAX's own and against the compiler."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hardware import CHIPS, GIB, LANES, SUBLANES, ChipFacts, chip

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def on(kind, cores=1):
    device = jax.sharding.AbstractDevice(kind, cores, "tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("name", CHIPS)
def test_jax_says_of_a_chip_what_the_table_says(name):
    listed = CHIPS[name]
    with on(KINDS[name], listed.cores):
        facts, info = chip(), pltpu.get_tpu_info()
    assert facts == listed.facts and (info.num_sublanes, info.num_lanes) == (SUBLANES, LANES)
    # JAX rounds its rates, and has 2,460 GB/s for a v5p, where cloud.google.com has 2,765
    assert info.bf16_ops_per_second == pytest.approx(listed.bf16, rel=3e-3)
    assert info.mem_bw_bytes_per_second == pytest.approx(listed.hbm, rel=0.12 if name == "v5p" else 3e-3)
    # A program may use all of the memory but a few per cent
    assert 0.97 < listed.memory / (info.hbm_capacity_bytes * listed.cores) < 1


def test_a_core_of_its_own_a_chip_beyond_the_table_and_no_tpu():
    with on("TPU v5", cores=1):
        assert chip() == CHIPS["v5p"].facts._replace(cores=1)
    with on("TPU v4", cores=2):
        assert chip() == ChipFacts(bf16_vpu=False, vmem=16 * 2**20, cores=2)
    with on("cpu"):
        assert chip() == CHIPS["v6e"].facts


COMPILE = """
import json, re, sys
import jax
from jax.experimental import topologies
for name in sys.argv[1:]:
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    x = jax.ShapeDtypeStruct((2**40,), "int8", sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).trace(x).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        memory = re.search(r"exceeds available HBM \\(([\\d.]+)G\\)", str(error))[1]
        print(json.dumps([device.device_kind, float(memory)]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_the_compiler_lets_a_program_use_the_memory_that_the_table_says():
    # Given a program of a terabyte, which the compiler refuses with what there is
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", "JAX_PLATFORMS": "cpu"}
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | quiet
    done = subprocess.run([sys.executable, "-c", COMPILE, *SLICES], capture_output=True, env=environment, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kind for kind, _ in found] == [KINDS[name] for name in CHIPS]
    # libtpu 0.0.50.1 keeps ten megabytes more of some chips for itself
    assert [memory for _, memory in found] == pytest.approx(
        [listed.memory / GIB for listed in CHIPS.values()], abs=0.02
    )
