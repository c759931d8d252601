"""Published models at full size, compiled for GPUs that are not here: minutes of CPU time each (`make slow`)."""

import dataclasses

import pytest

from kimi_jax import config_json, plan
from kimi_jax.plan import analytic
from kimi_jax.plan.messages import messages
from kimi_jax.plan.planner import with_experts
from sharding import mesh_sizes
from sharding.topologies import topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        plan.missing(topology("h100:1")) is not None, reason="the compiler for NVIDIA GPUs is not installed"
    ),
]
K25 = config_json.preset("kimi-k2.5")
LINEAR = with_experts(config_json.preset("kimi-linear-48b"), "int4")
TEMPORARIES = {"decode": 200e6, "prefill": 1e9}


@pytest.mark.parametrize(
    ("config", "slice_", "mesh", "phase", "batch", "context"),
    [
        (K25, "h200:8", "tensor=8", "decode", 64, 8192),
        (K25, "h200:8", "sequence=8", "decode", 64, 8192),
        (K25, "h200:8", "tensor=8", "prefill", 1, 2048),
        (LINEAR, "h100:1", "1x1", "decode", 4, 8192),
        (LINEAR, "h100:1", "1x1", "prefill", 1, 2048),
    ],
)
def test_a_step(config, slice_, mesh, phase, batch, context):
    tokens = context if phase == "prefill" else 1
    wanted = plan.Job(config, topology(slice_), mesh_sizes(mesh), phase, batch, context, tokens)
    compiled = plan.compiled(wanted)
    memory = analytic.memory(wanted, compiled.beside_arguments)
    assert abs(compiled.arguments - memory.weights - memory.cache) <= 0.001 * (memory.weights + memory.cache)
    assert compiled.in_place == pytest.approx(memory.cache, rel=0.01)
    assert compiled.temporaries <= TEMPORARIES[phase] and memory.headroom > 0

    # No weight is sent, and none copied but the halves of `kv_b_proj`, which plain JAX takes apart in a decode step
    text, copied = wanted.config.text, sum(moved.nbytes for moved in compiled.moved)
    assert {moved.how for moved in compiled.moved} <= {"copy"}
    heads = text.num_attention_heads // (wanted.mesh["tensor"] * wanted.mesh["sequence"])
    halves = 2 * heads * (text.qk_nope_head_dim + text.v_head_dim) * text.kv_lora_rank
    assert copied <= (halves * text.layer_kinds.count("mla") if phase == "decode" else 0)

    # The messages are those that the same step has on TPUs, but for numbers of shards, which XLA sends once
    large = [dataclasses.replace(one, in_loop=False) for one in messages(wanted, "tpu") if one.nbytes > 4]
    assert [dataclasses.replace(one, in_loop=False) for one in compiled.collectives if one.nbytes > 4] == large
