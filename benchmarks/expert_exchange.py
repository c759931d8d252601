"""Counts what a mixture's two layouts on a mesh send and compute, in programs compiled for eight CPU devices, not run.

    python benchmarks/expert_exchange.py [TOKENS ...]

The mixture is like K2.5's (64 experts, 8 chosen, width 1024), and tokens are sharded over `sequence`. Printed are the
bytes that a device receives and the FLOPs of one round, beside the estimates by which `sharding.expert_dispatch`
chooses. (There is one round unless a pair of devices exchanges a quarter more than the average. XLA's CPU compiler
all-gathers bf16 as float32.)
"""

import dataclasses
import math
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json
from kimi_jax.model.block import mix_experts
from kimi_jax.model.moe import MoE
from kimi_jax.model.param import Init, weight_specs
from sharding import Partition, StreamLayout, make_mesh
from sharding.expert_dispatch import dispatch_bytes, replicate_bytes

DEVICES, WIDTH, CHOSEN = 8, 1024, 8
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")
SHAPE = re.compile(r"(bf16|f32|s32)\[([\d,]*)\]")


def received(text: str) -> float:
    """Returns the bytes that a device receives in the collectives of a program's text, by ring algorithms."""
    total = 0.0
    for result, kind in COLLECTIVE.findall(text):
        size = sum(
            {"bf16": 2, "f32": 4, "s32": 4}[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in SHAPE.findall(result)
        )
        total += size * {"all-reduce": 2, "reduce-scatter": DEVICES}.get(kind, 1) * (DEVICES - 1) / DEVICES
    return total


def main(counts: list[int]) -> None:
    text = config_json.preset("kimi-k2.5").text
    config = dataclasses.replace(
        text, hidden_size=WIDTH, moe_intermediate_size=512, n_routed_experts=64, n_shared_experts=0
    )
    mesh = make_mesh((1, 1, 1, DEVICES))
    model = nnx.eval_shape(lambda: MoE(Init(jax.random.key(0), jnp.dtype(jnp.bfloat16)), config))
    graph, params = nnx.split(model)
    partition = Partition(mesh)
    print("tokens  way         MB received  estimate  GFLOP a device")
    for tokens in counts:
        for exchange in (False, True):
            layout = StreamLayout(partition, token_axes=("sequence",), dispatches=exchange)

            def run_local(params, x, layout=layout):
                return mix_experts(nnx.merge(graph, params), x, layout)

            spec = PartitionSpec(None, "sequence")
            run = partition.shard_map(run_local, (weight_specs(params, partition), spec), spec)
            x = jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
            compiled = jax.jit(run).lower(params, x).compile()
            estimate = replicate_bytes(tokens, WIDTH)
            if exchange:
                estimate = dispatch_bytes(tokens, WIDTH, CHOSEN, DEVICES, 1)
            way, sent = "exchanged" if exchange else "replicated", received(compiled.as_text())
            flops = compiled.cost_analysis()["flops"] / 1e9
            print(f"{tokens:6d}  {way:10s}  {sent / 1e6:11.2f}  {estimate / 1e6:8.2f}  {flops:14.2f}")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [64, 512, 4096])
