"""Compiles a decode step of a small K2.5 for a mesh of eight v5e cores that are not here, and prints what is in it.

Run by test_tpu_decode_step.py in a process of its own: libtpu reads flags that the tests set for simulated devices.
"""

import dataclasses
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json, decoding
from kimi_jax.model.kimi import abstract
from sharding import make_mesh

BATCH, CAPACITY = 8, 512


def main() -> None:
    published = config_json.preset("kimi-k2.5")
    text = dataclasses.replace(
        published.text,
        num_hidden_layers=2,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        n_routed_experts=16,
        num_attention_heads=8,
        vocab_size=2048,
    )
    config = dataclasses.replace(published, text=text, vision=None)
    mesh = make_mesh("2x1x4", topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)

    runner = decoding.Runner(abstract(config, mesh=mesh))
    state = runner.state_shapes(BATCH, CAPACITY)
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    step = decoding._step.trace(runner.program, runner.arrays, state, tokens)
    compiled = step.lower(lowering_platforms=("tpu",)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    print(
        json.dumps(
            {
                "kernels": Counter(re.findall(r"tpu_custom_call.*?op_name=\"[^\"]*/(\w+)/pallas_call\"", hlo)),
                "collectives": Counter(re.findall(rf" ({names})(?:-start)?\(", hlo)),
                "int4": Counter(re.findall(r" = \(?s4\[[^=]*?\} ([\w-]+)\(", hlo)),
                "temporaries": memory.temp_size_in_bytes,
                "in place": memory.alias_size_in_bytes,
                "state": sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state)),
            }
        )
    )


if __name__ == "__main__":
    main()
