"""Adds up what the compiler expects of a mixture layer of K2.5 in a decode step beside kernels and messages."""

import dataclasses

import pytest

from kimi_jax import config_json, plan
from sharding import mesh_sizes
from sharding.topologies import topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not plan.available(), reason="libtpu, the TPU compiler, is not installed"),
]


@pytest.mark.parametrize(
    ("slice_", "mesh", "cycles"),
    [
        # 8,400 of them are products: of low ranks, and of the shared expert
        ("v6e:8x8", "data=8,tensor=8", 16_000),
        ("v6e:8x8", "data=8,sequence=8", 14_000),
        # 19,700 of them
        ("tpu7x:2x2x1", "sequence=8", 32_000),
    ],
)
def test_small_operations_of_a_layer(slice_, mesh, cycles):
    published, found = config_json.preset("kimi-k2.5"), []
    # Given programs that differ in one mixture layer
    for layers in (2, 3):
        config = dataclasses.replace(published, text=dataclasses.replace(published.text, num_hidden_layers=layers))
        job = plan.Job(config, topology(slice_), mesh_sizes(mesh), "decode", 64, 8192)
        found.append(plan.compiled(job).small_cycles)
    assert 0 < found[1] - found[0] <= cycles
