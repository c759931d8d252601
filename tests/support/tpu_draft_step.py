"""Compiles drafts of heads of published widths for meshes of TPU cores that this machine does not have, and prints what
is in each, a line for each. Its arguments, four for each: the head, the slice, the mesh, and the tokens of each of 16
rows that are taken in.

Run by test_tpu_draft_step.py in a process of its own: libtpu reads flags that the tests set for simulated devices.
"""

import json
import re
import sys
from collections import Counter

import eagle_cases
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json
from kimi_jax.model.context import PAGE
from kimi_jax.model.eagle import abstract_head
from kimi_jax.model.kimi import abstract
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.traffic import collectives
from kimi_jax.runtime.eagle import EagleDrafter
from sharding import make_mesh

ROWS, CAPACITY, COUNT = 16, 8192, 3


def main(head: str, slice_: str, shape: str, tokens: int) -> None:
    config = config_json.eagle_from_dict(getattr(eagle_cases, head))
    target = abstract(config_json.preset("kimi-k3" if head == "K3_HEAD" else "kimi-k2.5"))
    mesh = make_mesh(shape, topologies.get_topology_desc(platform="tpu", topology_name=slice_).devices)
    drafter = EagleDrafter(abstract_head(config, mesh=mesh), target)

    def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))

    cache = drafter.cache_shapes(ROWS * CAPACITY // PAGE)
    aux = array(ROWS, tokens, config.num_aux * config.target_hidden_size, dtype=jnp.bfloat16)
    inputs = aux, array(ROWS, tokens), array(ROWS, tokens), array(ROWS, CAPACITY // PAGE)
    step = drafter.jitted.propose.trace(drafter.arrays, cache, *inputs, COUNT)
    compiled = step.lower(lowering_platforms=("tpu",)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    sent = collectives(parse(hlo), dict(mesh.shape))
    # Latents are on every device, keys and values on that of their head
    cached = 2 * ROWS * CAPACITY * config.cache_width // (mesh.size if config.form == "llama" else 1)
    found = {
        "kernels": Counter(re.findall(r"tpu_custom_call.*?op_name=\"[^\"]*/(\w+)/pallas_call\"", hlo)),
        "largest": max(message.nbytes for message in sent),
        "in place": memory.alias_size_in_bytes,
        "cache": cached,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 4):
        main(*sys.argv[first : first + 3], tokens=int(sys.argv[first + 3]))
