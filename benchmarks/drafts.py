"""Measures what verifying drafts costs: a step of four tokens of each row beside a step of one.

    python benchmarks/drafts.py cpu [--rounds 5]
    python benchmarks/drafts.py tpu [--topology v6e:8x8] [--mesh data=8,sequence=8] [--layers 3]

`cpu` runs both on toys, in turns, and compares the least time of each: more than 1.3 steps ends with 1. `tpu` compiles
both for TPUs that this machine does not have, K2.5 at its published sizes by default, and compares bytes through HBM
(`kimi_jax.plan.hbm`): more than 1.1 of one step's ends with 1. It needs libtpu.
"""

import argparse
import dataclasses
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

import checkpoints
from checkpoints.toy import toy_config, write_toy
from kimi_jax import config_json
from kimi_jax.model.context import PAGE
from kimi_jax.model.kimi import Kimi, abstract
from kimi_jax.plan.hbm import hbm_bytes
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.traffic import collectives
from kimi_jax.runtime.batch import Batch, padded_stop_ids, pages_in_order, prompts
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import Sampling
from sharding import make_mesh

TOKENS = 4
MOST_STEPS, MOST_BYTES = 1.3, 1.1
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


def bytes_on_tpus(model: Kimi, rows: int, context: int) -> float:
    """Prints the compiler's numbers of both steps. Returns the ratio of their bytes through HBM."""
    program, found = Program(model), []
    assert program.mesh is not None
    cache = program.cache_shapes(rows * context // PAGE, rows)
    for tokens in (1, TOKENS):
        batch = program.batch_shapes("decode" if tokens == 1 else "verify", rows, tokens, context // PAGE)
        jitted = program.jitted.step if tokens == 1 else program.jitted.verify
        began = time.perf_counter()
        compiled = jitted.trace(program.arrays, cache, batch).lower(lowering_platforms=("tpu",)).compile()
        seconds, memory, hlo = time.perf_counter() - began, compiled.memory_analysis(), parse(compiled.as_text())
        found.append(hbm_bytes(hlo))
        numbers = {
            "in place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "through HBM": found[-1],
            "messages": sum(one.count for one in collectives(hlo, dict(program.mesh.shape))),
        }
        shown = " | ".join(f"{name}: {number:,}" for name, number in numbers.items())
        print(f"tokens of a row: {tokens} | {shown} | compiled in {seconds:.0f} s", flush=True)
    print(f"bytes: {found[1] / found[0]:.3f} of one step's")
    return found[1] / found[0]


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
    options = parser.parse_args(arguments)
    if options.where == "cpu":
        rows = (options.rows,) if options.rows else (1, 4)
        ratios = [time_on_cpu(name, count, options.rounds) for name in TOYS for count in rows]
        return int(max(ratios) > MOST_STEPS)
    config = config_json.preset(options.model)
    # A text step has no use for the vision tower
    text = dataclasses.replace(config.text, num_hidden_layers=options.layers or config.text.num_hidden_layers)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    model = abstract(dataclasses.replace(config, text=text, vision=None), mesh=make_mesh(options.mesh, devices))
    return int(bytes_on_tpus(model, options.rows or 64, options.context) > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
