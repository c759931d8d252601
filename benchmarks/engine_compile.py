"""Compares the engine's programs with those of `generate`, compiled for TPUs or GPUs that this machine does not have.

    python benchmarks/engine_compile.py --topology v6e:8x8 --mesh data=8,sequence=8 [--layers 3] [--only decode]
    python benchmarks/engine_compile.py --model kimi-linear-48b --experts int4 --topology h100:1 --mesh 1x1 --slots 32

The steps are the ones that `Engine` warms and `generate` runs, sampling included: both are run over shapes up to the
call of the jitted program, whose arguments are compiled. Columns are a device's: bytes of arguments (weights, cache,
tokens), of which in place, temporaries, bytes that go to and from HBM (`kimi_jax.plan.compile`), messages and the bytes
that they send at least. A program that is the same as one before it, to the letter, is not compiled again. Compiled,
not run. Needs libtpu (`pip install -e .[test]` on Linux), or for GPUs the extra `gpu-compile`.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

# Before JAX is imported: libtpu reads these once. No TPU is asked for, and others may use libtpu too.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
os.environ |= {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
os.environ.pop("XLA_FLAGS", None)

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import config_json
from kimi_jax.engine.runner import Runner
from kimi_jax.model.kimi import Kimi, abstract
from kimi_jax.plan import compile as compilers
from kimi_jax.plan import gpu_target
from kimi_jax.plan.hlo import parse
from kimi_jax.plan.planner import with_experts
from kimi_jax.plan.traffic import collectives
from kimi_jax.runtime import generate
from kimi_jax.runtime.batch import Batch, Chosen
from kimi_jax.runtime.cache import Cache
from kimi_jax.runtime.program import Program
from sharding import make_mesh
from sharding.topologies import Topology, topology

HEADINGS = ("program", "arguments", "in place", "temporaries", "through HBM", "messages", "bytes sent", "seconds")


@dataclasses.dataclass(frozen=True)
class Row:
    """A program of one side, and the compiler's numbers for a device."""

    side: str
    program: str
    arguments: int
    in_place: int
    temporaries: int
    hbm_bytes: int
    messages: int
    sent: int
    kinds: dict[str, int]
    seconds: float


class Noted(Program):
    """A program that notes the arguments of its steps, and runs none."""

    def __init__(self, model: Kimi, *drafting: Any):
        super().__init__(model, *drafting)
        self.steps: list[tuple[Cache, Batch]] = []

    def cache(self, pages: int, slots: int) -> Cache:
        return self.cache_shapes(pages, slots)

    def replicate(self, array: np.ndarray) -> Any:
        assert self.mesh is not None
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def counts(self, slots: int) -> Any:
        shape = (slots, self.config.text.vocab_size)
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=self._counts_sharding(slots))

    def count_tokens(self, counts: Any, tokens: Any, counted: np.ndarray) -> Any:
        return counts

    def set_counts(self, counts: Any, slot: int, row: np.ndarray) -> Any:
        return counts

    def step(self, cache: Cache, batch: Batch) -> tuple[Cache, Chosen]:
        self.check(batch)
        self.steps.append((cache, batch))
        return cache, self.nothing_chosen(len(batch.choosing))

    def copy_slots(self, cache: Cache, source: Any, target: Any, origin: Cache | None = None) -> Cache:
        return cache


class NotedError(Exception):
    """The step that was waited for has been noted."""


def generate_steps(model: Kimi, rows: int, tokens: int, context: int) -> dict[str, tuple[Cache, Batch]]:
    """Returns the prefill and the decode step of `generate` for so many rows of `tokens` tokens, with room for
    `context`."""
    noted = Noted(model)
    step = noted.step

    def until_decode(cache: Cache, batch: Batch) -> tuple[Cache, Chosen]:
        result = step(cache, batch)
        if batch.phase == "decode":
            raise NotedError
        return result

    with mock.patch.object(noted, "step", until_decode), mock.patch.object(generate, "Program", lambda *_: noted):
        try:
            prompts = np.zeros((rows, tokens), np.int32)
            list(generate.stream(model, prompts, max_new_tokens=context - tokens, prefill_chunk=tokens))
        except NotedError:
            pass
    prefill, decode = noted.steps
    return {"prefill": prefill, "decode": decode}


def engine_steps(model: Kimi, slots: int, tokens: int, context: int, cache: Cache) -> dict[str, tuple[Cache, Batch]]:
    """Returns the steps that an engine of so many slots warms, by its names for them; its cache has as many pages as
    `cache`."""
    with mock.patch("kimi_jax.engine.runner.Program", Noted):
        runner = Runner(
            model,
            slots=slots,
            pages=cache.pages,
            places=0,
            row_pages=cache.pages // slots,
            chunks=(tokens,),
            decode_rows=(slots,),
        )
    runner.take = runner.place = lambda chosen, *_: chosen
    runner.packed_chunks = (tokens,)
    noted: Any = runner.program
    # (those of counts come last, and are no steps)
    return dict(zip(list(runner.warm())[: len(noted.steps)], noted.steps, strict=True))


def lowered(program: Program, step: tuple[Cache, Batch], platform: str) -> Any:
    """Traces and lowers a step for TPUs or GPUs."""
    return program.jitted.step.trace(program.arrays, *step).lower(lowering_platforms=(platform,))


def measure(side: str, name: str, step: Any, mesh: Mapping[str, int], slice_: Topology) -> Row:
    """Compiles a lowered step and reads its numbers."""
    began = time.perf_counter()
    compiled = step.compile()
    seconds = time.perf_counter() - began
    memory, hlo = compiled.memory_analysis(), parse(compiled.as_text())
    sent = collectives(hlo, dict(mesh))
    return Row(
        side=side,
        program=name,
        arguments=memory.argument_size_in_bytes,
        in_place=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        hbm_bytes=compilers.traffic(hlo, slice_),
        messages=sum(one.count for one in sent),
        sent=int(sum(one.sent for one in sent)),
        kinds={kind: sum(one.count for one in sent if one.kind == kind) for kind in sorted({one.kind for one in sent})},
        seconds=seconds,
    )


def all_steps(model: Kimi, slots: int, tokens: int, context: int) -> dict[tuple[str, str], tuple[Cache, Batch]]:
    """Returns the steps of both sides: decode of all slots, and prefill of a row of each data shard."""
    whole = generate_steps(model, slots, 1, context)["decode"]
    program = Program(model)
    steps = {("generate", f"decode, {slots} rows"): whole}
    steps |= {("engine", name): step for name, step in engine_steps(model, slots, tokens, context, whole[0]).items()}
    cache, batch = generate_steps(model, program.data, tokens, context)["prefill"]
    # with the pages of all slots, as the engine's
    steps["generate", f"prefill, {tokens} tokens"] = (program.cache_shapes(whole[0].pages, cache.slots), batch)
    return dict(sorted(steps.items(), key=lambda step: (step[0][1], step[0][0] == "engine")))


def compare(model: Kimi, steps: Mapping[tuple[str, str], tuple[Cache, Batch]], slice_: Topology) -> Iterator[Row]:
    """Compiles steps, those with the same text once, and yields their rows."""
    program = Program(model)
    assert program.mesh is not None
    known: dict[str, Row] = {}
    for (side, name), step in steps.items():
        text = (found := lowered(program, step, slice_.platform)).as_text()
        if text in known:
            yield dataclasses.replace(known[text], side=side, program=name, seconds=0.0)
        else:
            known[text] = measure(side, name, found, program.mesh.shape, slice_)
            yield known[text]


def show(row: Row) -> None:
    numbers = (row.arguments, row.in_place, row.temporaries, row.hbm_bytes, row.messages, row.sent)
    took = f"{row.seconds:.0f}" if row.seconds else "the same program"
    print(" | ".join([f"{row.side}: {row.program}", *(f"{number:,}" for number in numbers), took]), flush=True)


def main(arguments: list[str]) -> None:
    """Compiles and prints what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kimi-k2.5", help="preset, or folder with a config.json")
    parser.add_argument("--experts", choices=["int4", "bf16"], help="format of routed experts (default: as published)")
    parser.add_argument("--topology", default="v6e:8x8", metavar="SLICE")
    parser.add_argument("--mesh", default="data=8,sequence=8", metavar="AXIS=N,...")
    parser.add_argument("--slots", type=int, default=64, help="rows of a decode step")
    parser.add_argument("--tokens", type=int, default=512, help="of a row in a prefill step")
    parser.add_argument("--context", type=int, default=8192, help="tokens that the cache holds of each row")
    parser.add_argument("--layers", type=int, help="keep so many layers (default: all)")
    parser.add_argument("--only", default="", help="programs whose names begin so: decode, or prefill")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    folder = Path(options.model)
    config = config_json.from_folder(folder) if folder.is_dir() else config_json.preset(options.model)
    layers = options.layers or config.text.num_hidden_layers
    # A text step has no use for the vision tower
    text = dataclasses.replace(config.text, num_hidden_layers=layers)
    config = dataclasses.replace(config, text=text, vision=None)
    if options.experts:
        config = with_experts(config, options.experts)
    slice_ = topology(options.topology)
    if reason := compilers.missing(slice_):
        sys.exit(f"{Path(__file__).name}: {reason}")
    if slice_.is_gpu:
        os.environ |= gpu_target.environment()  # XLA reads it when it starts, at the first look for devices
    model = abstract(config, mesh=make_mesh(options.mesh, compilers.devices(slice_)))
    steps = all_steps(model, options.slots, options.tokens, options.context)
    rows = []
    print(" | ".join(HEADINGS))
    chosen = {name: step for name, step in steps.items() if name[1].startswith(options.only)}
    for row in compare(model, chosen, slice_):
        show(row)
        rows.append(row)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
