"""Compiles a decode step of a small model of a preset's kind (its name is the argument) for a mesh of eight v5e cores
that are not here, and prints what is in it.

Run by test_tpu_decode_step.py in a process of its own: libtpu reads flags that the tests set for simulated devices.
"""

import dataclasses
import json
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json, decoding
from kimi_jax import state as states
from kimi_jax.model.kimi import abstract
from sharding import make_mesh, spec

BATCH, CAPACITY = 8, 512


def main(preset: str) -> None:
    published = config_json.preset(preset)
    linear = published.text.linear_attn
    text = dataclasses.replace(
        published.text,
        num_hidden_layers=2,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        n_routed_experts=16,
        num_attention_heads=8,
        vocab_size=2048,
        linear_attn=linear and dataclasses.replace(linear, kda_layers=(1,), full_attn_layers=(2,)),
    )
    config = dataclasses.replace(published, text=text, vision=None)
    mesh = make_mesh("2x4", topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)

    graph, params = nnx.split(abstract(config))
    laid = [
        (path, variable.replace(_struct(variable, NamedSharding(mesh, spec(axes, variable.shape, mesh)))))
        for path, variable in nnx.to_flat_state(params)
        if (axes := variable.get_metadata()["axes"])
    ]
    arrays, tree = jax.tree.flatten(nnx.from_flat_state(laid))
    empty = jax.eval_shape(lambda: states.empty(config, BATCH, CAPACITY, jnp.bfloat16))
    state = jax.tree.map(lambda array: _struct(array, decoding._by_row(array.shape, BATCH, mesh)), empty)
    tokens = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    program = decoding._program(graph, tree, mesh.abstract_mesh)
    compiled = decoding._step.trace(program, arrays, state, tokens).lower(lowering_platforms=("tpu",)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    print(
        json.dumps(
            {
                "kernels": Counter(re.findall(r"tpu_custom_call.*?op_name=\"[^\"]*/(\w+)/pallas_call\"", hlo)),
                "collectives": Counter(re.findall(rf" ({names})(?:-start)?\(", hlo)),
                "moved states": re.findall(r"f32\[\d+,32,128,128\]\S* (?:copy|transpose|fusion)\(.*", hlo),
                "temporaries": memory.temp_size_in_bytes,
                "in place": memory.alias_size_in_bytes,
                "state": sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(empty)),
            }
        )
    )


def _struct(array: jax.Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


if __name__ == "__main__":
    main(sys.argv[1])
