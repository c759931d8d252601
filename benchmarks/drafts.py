"""Measures what verifying drafts costs: a step of four tokens of each row beside a step of one.

    python benchmarks/drafts.py cpu [--rounds 5]
    python benchmarks/drafts.py tpu [--topology v6e:8x8] [--mesh data=8,sequence=8] [--layers 3] [--head eagle3-mla]

`cpu` runs both on toys, in turns, and compares the least time of each: more than 1.3 steps ends with 1. `tpu` compiles
both for TPUs that this machine does not have, K2.5 at its published sizes by default, and compares bytes through HBM
(`kimi_jax.plan.hbm`): more than 1.1 of one step's ends with 1. With `--head` both steps draft with a head too, of the
widths published for K2.5, and what it takes beside a plain step of one token does not count for the limit. It needs
libtpu.
"""

import argparse
import dataclasses
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Before JAX is imported: libtpu reads these once. No TPU is asked for, and others may use libtpu too.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
os.environ |= {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

import checkpoints
from checkpoints.toy import HEADS, head_config, toy_config, write_toy
from kimi_jax import config_json
from kimi_jax.config import KimiConfig
from kimi_jax.model.context import PAGE
from kimi_jax.model.eagle import EagleHead, abstract_head
from kimi_jax.model.kimi import Kimi, abstract
from kimi_jax.plan.hbm import hbm_bytes
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.traffic import collectives, moved_weights
from kimi_jax.runtime.batch import Batch, padded_stop_ids, pages_in_order, prompts
from kimi_jax.runtime.eagle import EagleDrafter
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import Sampling
from sharding import make_mesh

TOKENS = 4
MOST_STEPS, MOST_BYTES = 1.3, 1.1
WEIGHTS = r"(arrays|head)\["
# Where the published head of this form differs from a toy's.
LLAMA = {"intermediate_size": 12288, "num_key_value_heads": 64, "head_dim": 128, "draft_vocab_size": 163840}
TOYS = ("k2.5", "kimi-linear", "k3")


def steps_of(model: Kimi, rows: int, context: int) -> tuple[Program, Any, dict[int, Batch]]:
    """Returns a program, its cache after prompts of `context` tokens, and batches of one token and of TOKENS."""
    program, vocab = Program(model), model.config.text.vocab_size
    table = pages_in_order(rows, context + 64)
    ids = np.random.RandomState(0).randint(0, vocab, (rows, context)).astype(np.int32)
    first, *_ = prompts(
        ids,
        np.full(rows, context),
        table,
        chunk=context,
        max_new_tokens=64,
        sampling=[Sampling()] * rows,
        seeds=np.zeros(rows, np.uint64),
        stop_ids=padded_stop_ids((), rows, vocab),
    )
    cache = program.cache(table.size, rows)
    cache, chosen = program.step(cache, dataclasses.replace(first, previous=program.nothing_chosen(rows)))
    at, drafts = np.full(rows, context), ids[:, : TOKENS - 1]
    return program, cache, {1: first.next_token(at, chosen), TOKENS: first.verification(at, drafts, chosen)}


def time_on_cpu(name: str, rows: int, rounds: int) -> float:
    """Prints the times of both steps of a toy. Returns their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.load(write_toy(Path(folder) / "toy", toy_config(name)), dtype=jnp.float32)
    program, cache, batches = steps_of(model, rows, 256)
    least = dict.fromkeys(batches, float("inf"))
    for number in range(rounds + 1):
        for tokens, batch in batches.items():
            run: Any = program.step if tokens == 1 else program.verify
            for _ in range(20):
                began = time.perf_counter()
                cache, _ = jax.block_until_ready(run(cache, batch))
                if number:  # the first round compiles
                    least[tokens] = min(least[tokens], time.perf_counter() - began)
    ratio = least[TOKENS] / least[1]
    one, verified = (f"{1000 * seconds:.2f} ms" for seconds in least.values())
    print(f"{name}, rows of a step: {rows} | one token: {one} | {TOKENS}: {verified} | {ratio:.2f} steps", flush=True)
    return ratio


def steps_on_tpus(model: Kimi, rows: int, context: int, head: EagleHead | None) -> bool:
    """Prints the compiler's numbers of a step of one token and of a verification of TOKENS, with a `head` of those with
    which it drafts too. Returns whether the bytes through HBM are within the limit: with a head, those of the
    verification that are not its own."""
    drafter = None if head is None else EagleDrafter(head, model)
    plain, drafting = Program(model), Program(model, drafter, TOKENS - 1)
    steps = [(plain, 1), (plain, TOKENS)] if head is None else [(plain, 1), (drafting, 1), (drafting, TOKENS)]
    found = [bytes_on_tpus(program, rows, context, tokens) for program, tokens in steps]
    if head is not None:
        found = [found[0], found[2] - (found[1] - found[0])]
    print(f"bytes: {found[1] / found[0]:.3f} of one step's{'' if head is None else ', without those of the head'}")
    return found[1] <= MOST_BYTES * found[0]


def bytes_on_tpus(program: Program, rows: int, context: int, tokens: int) -> int:
    """Prints the compiler's numbers of a step of so many tokens of each row. Returns its bytes through HBM."""
    assert program.mesh is not None
    mesh, cache = dict(program.mesh.shape), program.cache_shapes(rows * context // PAGE, rows)
    batch = program.batch_shapes("decode" if tokens == 1 else "verify", rows, tokens, context // PAGE)
    jitted = program.jitted.step if tokens == 1 else program.jitted.verify
    began = time.perf_counter()
    traced = jitted.trace(program.arrays, cache, batch, program.head_arrays)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds, memory, hlo = time.perf_counter() - began, compiled.memory_analysis(), parse(compiled.as_text())
    sent, moved = collectives(hlo, mesh), moved_weights(hlo, WEIGHTS)
    numbers = {
        "arguments": memory.argument_size_in_bytes,
        "in place": memory.alias_size_in_bytes,
        "of a cache of": sum(
            math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            for array in jax.tree.leaves(cache)
        ),
        "temporaries": memory.temp_size_in_bytes,
        "through HBM": (through := hbm_bytes(hlo)),
        "messages": sum(one.count for one in sent),
        "the largest of": max((one.nbytes for one in sent), default=0),
        "weights moved": sum(one.nbytes for one in moved),
    }
    shown = " | ".join(f"{name}: {number:,}" for name, number in numbers.items())
    drafts = "" if program.drafter is None else ", and drafts"
    print(f"tokens of a row: {tokens}{drafts} | {shown} | compiled in {seconds:.0f} s", flush=True)
    return through


def head_of(target: KimiConfig, preset: str, kind: str, mesh: Mesh) -> EagleHead:
    """Returns shapes of a head of a `kind`, with the widths of those published for K2.5, which takes the outputs of
    the last of the `target`'s layers that is there where it would take later ones."""
    layers = target.text.num_hidden_layers
    fields = head_config(toy_config(preset), kind, **(LLAMA if kind == "eagle3-llama" else {}))
    fields["eagle_aux_hidden_state_layer_ids"] = [min(done, layers) for done in (2, 30, 58)]
    return abstract_head(config_json.eagle_from_dict(fields), mesh=mesh)


def main(arguments: list[str]) -> int:
    """Measures what the flags ask for. Returns 1 where a limit is passed, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=["cpu", "tpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="of a step (default: 1 and 4 on a CPU, 64 on TPUs)")
    parser.add_argument("--model", default="kimi-k2.5", help="preset that is compiled for TPUs")
    parser.add_argument("--topology", default="v6e:8x8", metavar="SLICE")
    parser.add_argument("--mesh", default="data=8,sequence=8", metavar="AXIS=N,...")
    parser.add_argument("--context", type=int, default=8192, help="tokens that the cache holds of each row")
    parser.add_argument("--layers", type=int, help="keep so many layers (default: all)")
    parser.add_argument("--head", choices=HEADS, help="a draft head that the compiled steps run too (default: none)")
    options = parser.parse_args(arguments)
    if options.where == "cpu":
        rows = (options.rows,) if options.rows else (1, 4)
        ratios = [time_on_cpu(name, count, options.rounds) for name in TOYS for count in rows]
        return int(max(ratios) > MOST_STEPS)
    config = config_json.preset(options.model)
    # A text step has no use for the vision tower
    text = dataclasses.replace(config.text, num_hidden_layers=options.layers or config.text.num_hidden_layers)
    config = dataclasses.replace(config, text=text, vision=None)
    mesh = make_mesh(options.mesh, topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices)
    head = None if options.head is None else head_of(config, options.model, options.head, mesh)
    return int(not steps_on_tpus(abstract(config, mesh=mesh), options.rows or 64, options.context, head))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
