"""The engine's host time a step, the gaps between tokens beside a long prompt, and its memory over many requests.

    python benchmarks/engine_steps.py host|gaps|memory [--family K2]

`host`: the engine's thread with 64 requests that decode, on a program that returns at once: CPU time from one plan to
the next, so scheduler, arrays, stop strings (which make text of each token) and hand-over, but no device.
`gaps`: eight requests decode and a prompt of 4,096 tokens comes; times between two tokens of one request while it is
taken in, for each `prefill_chunk`. `memory`: resident memory and compiled programs after 200 and after 2,000 requests.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from cpu_vs_transformers import FAMILIES

import kimi_jax
from checkpoints.toy import toy_config, write_toy
from kimi_jax.engine.runner import Runner
from kimi_jax.engine.sequence import Step
from kimi_jax.runtime.batch import Batch, Chosen, Finish
from kimi_jax.runtime.program import Program

RANDOM = np.random.RandomState(0)
ROWS, STEPS = 64, 256
LONG, DECODING, PROMPT = 4096, 8, 64
FEW, MANY = 200, 2000
TINY = {"Kimi Linear": "kimi-linear", "K2": "k2"}


class HostArray(np.ndarray):
    """An array that is on the host already."""

    def copy_to_host_async(self) -> None: ...


class InstantProgram(Program):
    """Chooses one token for every sequence, on the host, without a device."""

    def step(self, cache: Any, batch: Batch) -> tuple[Any, Chosen]:
        tokens = np.full(len(batch.ends), 7, np.int32)
        ended = batch.positions.max(axis=1) + 2 >= batch.ends if batch.segments is None else np.zeros(len(tokens), bool)
        finish = np.where(ended, Finish.LENGTH, Finish.NOT_YET).astype(np.int32)
        return cache, Chosen(tokens.view(HostArray), finish.view(HostArray))


class InstantRunner(Runner):
    """Runs steps on an `InstantProgram`; notes the CPU time of the engine's thread and the rows of each step."""

    def __init__(self, model: Any, drafter: Any = None, **sizes: Any):
        super().__init__(model, drafter, **sizes)
        self.program, self.times = InstantProgram(model), []
        self.place = lambda chosen, new, slots: chosen

    def run(self, step: Step) -> Any:
        self.times.append((time.thread_time(), len(step.decode)))
        return self._run(step)

    def warm(self) -> Any:
        return iter(())


def tiny(family: str, folder: Path) -> Any:
    return kimi_jax.load(write_toy(folder / "model", toy_config(TINY[family])), dtype=jnp.float32)


def answer_all(engine: kimi_jax.Engine, requests: list[kimi_jax.Request]) -> None:
    """Submits all requests at once, and reads their events until the last has ended."""

    async def read(request: kimi_jax.Request) -> None:
        async for _ in engine.submit(request):
            pass

    async def everybody() -> None:
        await asyncio.gather(*map(read, requests))

    asyncio.run(everybody())


def host(family: str, folder: Path) -> None:
    import kimi_jax.engine.engine as module

    model = tiny(family, folder)
    module.Runner = InstantRunner  # type: ignore[misc]
    tokenizer = (
        kimi_jax.Tokenizer.from_folder(folder / "model") if (folder / "model" / "tiktoken.model").exists() else None
    )
    for stops in [(), ("no such text",)] if tokenizer is not None else [()]:
        with kimi_jax.Engine(model, slots=ROWS, cache_memory="64MiB", tokenizer=tokenizer) as engine:
            prompts = RANDOM.randint(0, 200, (ROWS, 20))
            more = {"max_new_tokens": STEPS, "stop_ids": (), "stop_strings": stops}
            answer_all(engine, [kimi_jax.Request(prompt, **more) for prompt in prompts])
            times = engine.runner.times
        each = [1e3 * (b[0] - a[0]) for a, b in itertools.pairwise(times) if a[1] == b[1] == ROWS]
        print(
            f"host, {family}, {ROWS} rows{', with stop strings' if stops else ''}: least {min(each):.2f} ms a step, "
            f"median {np.median(each):.2f} ms"
        )


def gaps(family: str, folder: Path) -> None:
    model = kimi_jax.load(write_toy(folder / "model", FAMILIES[family]), dtype=jnp.float32)
    for chunk in (512, 64):
        with kimi_jax.Engine(model, slots=DECODING + 1, cache_memory="256MiB", prefill_chunk=chunk) as engine:

            async def read(prompt: np.ndarray, new: int, engine: kimi_jax.Engine = engine) -> list[float]:
                request = kimi_jax.Request(prompt, max_new_tokens=new, stop_ids=())
                return [time.perf_counter() async for _ in engine.submit(request)]

            async def everybody() -> tuple[list[list[float]], float, float]:
                rows = [asyncio.create_task(read(RANDOM.randint(0, 200, PROMPT), 400)) for _ in range(DECODING)]
                await asyncio.sleep(1)
                came = time.perf_counter()
                (first,) = await read(RANDOM.randint(0, 200, LONG), 1)
                return await asyncio.gather(*rows), came, first

            times, came, first = asyncio.run(everybody())
        pairs = [(a, b) for row in times for a, b in itertools.pairwise(row)]
        every = np.array([1e3 * (b - a) for a, b in pairs])
        beside = np.array([1e3 * (b - a) for a, b in pairs if b > came and a < first])
        for name, values in (("all gaps", every), ("gaps beside the prompt", beside)):
            p50, p99 = np.quantile(values, [0.5, 0.99])
            print(
                f"gaps, {family}, chunks of {chunk}, {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
                f"ratio {p99 / p50:.2f}; the prompt took {first - came:.2f} s",
                flush=True,
            )


def memory(family: str, folder: Path) -> None:
    model = tiny(family, folder)
    with kimi_jax.Engine(model, slots=4, cache_memory="8MiB", prefill_chunk=64) as engine:
        for total in (FEW, MANY):
            done = 0 if total == FEW else FEW
            lengths = RANDOM.randint(1, 300, total - done)
            for begin in range(0, len(lengths), 100):
                some = [
                    kimi_jax.Request(RANDOM.randint(0, 200, n), max_new_tokens=8) for n in lengths[begin : begin + 100]
                ]
                answer_all(engine, some)
            resident = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
            programs = engine.stats().compiled_programs
            print(f"memory, {family}, after {total} requests: {resident:.1f} MiB, {programs} programs", flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"host": host, "gaps": gaps, "memory": memory}
    parser.add_argument("measure", choices=tuple(measures))
    parser.add_argument("--family", choices=tuple(FAMILIES), default="K2")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        measures[options.measure](options.family, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
