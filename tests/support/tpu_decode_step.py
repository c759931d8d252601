"""Compiles decode steps of small models of a preset's kind for meshes of TPU cores that this machine does not have, and
prints what is in each, a line for each. Its arguments, four for each: the preset, the slice, the mesh, the batch.

Run by test_tpu_decode_step.py in a process of its own: libtpu reads flags that the tests set for simulated devices.
"""

import dataclasses
import json
import math
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json
from kimi_jax.model.context import PAGE
from kimi_jax.model.kimi import abstract
from kimi_jax.plan.hlo import FREE, Instruction, nbytes, parse, result
from kimi_jax.plan.traffic import collectives
from kimi_jax.runtime.choose import choose
from kimi_jax.runtime.program import Program
from sharding import make_mesh, mesh_sizes

LATENTS = 576  # of both models
CAPACITY = 512  # tokens, at least
# Fewer bytes than any weight or state, more than anything else that a step makes.
LARGE = 2**18


def main(preset: str, slice_: str, shape: str, batch: int) -> None:
    published = config_json.preset(preset)
    linear = published.text.linear_attn
    text = dataclasses.replace(
        published.text,
        num_hidden_layers=2,
        hidden_size=2048,
        intermediate_size=1024,
        moe_intermediate_size=512,
        n_routed_experts=64,
        num_attention_heads=max(8, mesh_sizes(shape)[-1]),
        vocab_size=2048,
        linear_attn=linear and dataclasses.replace(linear, kda_layers=(1,), full_attn_layers=(2,)),
    )
    config = dataclasses.replace(published, text=text, vision=None)
    mesh = make_mesh(shape, topologies.get_topology_desc(platform="tpu", topology_name=slice_).devices)

    program = Program(abstract(config, mesh=mesh))
    row_pages = -(-CAPACITY // (PAGE * program.sequence)) * program.sequence
    cache = program.cache_shapes(batch * row_pages, batch)
    instructions = program.batch_shapes("decode", batch, 1, row_pages)
    step = program.jitted.logits.trace(program.arrays, cache, instructions)
    compiled = step.lower(lowering_platforms=("tpu",)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    parsed = parse(hlo)
    entry = parsed.computations[parsed.entry].values()
    sent = collectives(parsed, dict(mesh.shape))
    messages: Counter[str] = Counter()
    for message in sent:
        messages[message.kind] += message.count
    chosen = choosing(program, batch, row_pages)
    print(
        json.dumps(
            {
                "kernels": Counter(re.findall(r"tpu_custom_call.*?op_name=\"[^\"]*/(\w+)/pallas_call\"", hlo)),
                "collectives": messages,
                "largest": max(message.nbytes for message in sent if message.kind != "all-to-all"),
                "copies": [one.name for one in entry if _copies(one)],
                "choosing": sorted({message.kind for message in collectives(parse(chosen), dict(mesh.shape))}),
                "largest of choosing": max(m.nbytes for m in collectives(parse(chosen), dict(mesh.shape))),
                "small operations": sum('"estimated_cycles"' in one.attributes for one in entry),
                "sorts": len(re.findall(r"\bsort\(|TopK", chosen)),
                "in place": memory.alias_size_in_bytes,
                "cache": sum(
                    math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
                    for array in jax.tree.leaves(cache)
                ),
            }
        )
    )


def choosing(program: Program, batch: int, row_pages: int) -> str:
    """Returns the HLO of choosing tokens from a decode step's logits, with all that an engine's requests can ask."""
    everything = program.batch_shapes("decode", batch, 1, row_pages, extras=True)
    # The logits are sharded as the counts of tokens are
    logits = jax.ShapeDtypeStruct(everything.counts.shape, jnp.float32, sharding=everything.counts.sharding)
    choose_on_mesh = jax.jit(choose, static_argnums=2, out_shardings=NamedSharding(program.mesh, PartitionSpec()))
    step = choose_on_mesh.trace(logits, everything, program.data)
    return step.lower(lowering_platforms=("tpu",)).compile().as_text()


def _copies(instruction: Instruction) -> bool:
    """Says whether an instruction writes something large to HBM, and not in place. (A step may copy a KDA state to VMEM
    and back whole, but not the pages of a cache.)"""
    between_memories = instruction.op == "copy-start" and "S(1)" in instruction.shape
    state = between_memories and f"{LATENTS},{PAGE}]" not in instruction.shape
    if instruction.op in FREE or instruction.op.endswith(("-done", "-update")) or state:
        return False
    in_place = "output_to_operand_aliasing" in instruction.attributes
    return not in_place and nbytes(result(instruction), hbm_only=True) >= LARGE


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 4):
        main(*sys.argv[first : first + 3], batch=int(sys.argv[first + 3]))
