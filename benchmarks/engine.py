"""The engine's throughput and latency against the number of requests at once, beside transformers' static batches.

    pip install -e .[oracle]
    python benchmarks/engine.py [--rounds 3] [--only peer|ours] [--json FILE]

Random 48M-parameter models of both families in float32 (those of cpu_vs_transformers.py), prompts of 64 tokens, 32 new
ones. Both sides run in this process on the same cores and take turns; each number is the best over the rounds.
transformers has all prompts of a batch at once, equally long, and waits for the last: the bound of anything that it
could serve. Its continuous batching does not run these models. The engine takes the requests as they come.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cpu_vs_transformers import FAMILIES
from rich.console import Console
from rich.table import Table

from checkpoints.toy import write_toy

PROMPT, NEW = 64, 32
AT_ONCE = (1, 4, 16)
OURS, PEER = "kimi-jax engine", "transformers, static batch"


@dataclass(frozen=True)
class Timing:
    """New tokens a second over all requests, and milliseconds to the first token and between two, medians and 99th
    percentiles; the peer has only the first number."""

    tokens_per_second: float
    first_ms: float = float("nan")
    between_ms: float = float("nan")
    between_p99_ms: float = float("nan")


@dataclass(frozen=True)
class Result:
    """The best round of one side with so many requests at once."""

    family: str
    side: str
    at_once: int
    timing: Timing


Side = Callable[[np.ndarray], Timing]


def peer_side(folder: Path, config: dict[str, Any]) -> Side:
    """Returns transformers' own model, with the experts' implementation that is faster in a batch."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    family = "KimiLinear" if config["model_type"] == "kimi_linear" else "DeepseekV3"
    native = getattr(transformers, f"{family}Config")(**{k: v for k, v in config.items() if k != "model_type"})
    models = [
        getattr(transformers, f"{family}ForCausalLM")
        .from_pretrained(
            folder, config=native, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        )
        .eval()
        for experts in ("eager", "grouped_mm")
    ]

    def run(prompts: np.ndarray) -> Timing:
        seconds = []
        for model in models:
            with torch.inference_mode():
                began = time.perf_counter()
                tokens = torch.from_numpy(prompts)
                out = model(tokens, use_cache=True, logits_to_keep=1)
                for _ in range(NEW - 1):
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                out.logits[:, -1].argmax(-1).tolist()
                seconds.append(time.perf_counter() - began)
        return Timing(len(prompts) * NEW / min(seconds))

    return run


def our_side(folder: Path) -> Iterator[Side]:
    """Yields the engine's side once; the engine is closed afterwards."""
    import jax.numpy as jnp

    import kimi_jax

    model = kimi_jax.load(folder, dtype=jnp.float32)
    with kimi_jax.Engine(model, slots=max(AT_ONCE), cache_memory="256MiB") as engine:

        async def one(prompt: np.ndarray) -> list[float]:
            request = kimi_jax.Request(prompt, max_new_tokens=NEW, stop_ids=())
            return [time.perf_counter() async for _ in engine.submit(request)]

        async def everybody(prompts: np.ndarray) -> list[list[float]]:
            return await asyncio.gather(*map(one, prompts))

        def run(prompts: np.ndarray) -> Timing:
            began = time.perf_counter()
            times = asyncio.run(everybody(prompts))
            seconds = max(map(max, times)) - began
            between = np.concatenate([np.diff(arrivals) for arrivals in times])
            return Timing(
                len(prompts) * NEW / seconds,
                1e3 * float(np.median([arrivals[0] - began for arrivals in times])),
                1e3 * float(np.median(between)),
                1e3 * float(np.quantile(between, 0.99)),
            )

        yield run


def measure(family: str, rounds: int, only: str | None) -> list[Result]:
    """Runs both sides in turn, `rounds` times after one that does not count, each time with other prompts."""
    config = FAMILIES[family]
    random = np.random.RandomState(0)
    best: dict[tuple[str, int], Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_toy(Path(folder) / "model", config)
        sides: dict[str, Side] = {}
        if only != "ours":
            sides[PEER] = peer_side(path, config)
        ours = our_side(path)
        if only != "peer":
            sides[OURS] = next(ours)
        for number in range(rounds + 1):
            print(f"{family}: {f'round {number} of {rounds}' if number else 'warming up'}", file=sys.stderr)
            for count in AT_ONCE:
                prompts = random.randint(0, config["vocab_size"] - 256, (count, PROMPT))
                for name, run in sides.items():
                    time.sleep(0.3)  # the other side's threads spin for a while before they sleep
                    timing = run(prompts)
                    before = best.get((name, count))
                    if number and (before is None or timing.tokens_per_second > before.tokens_per_second):
                        best[name, count] = timing
        ours.close()
    return [Result(family, name, count, timing) for (name, count), timing in best.items()]


def show(results: list[Result]) -> None:
    console = Console(width=140)
    table = Table(title=f"float32, prompts of {PROMPT} tokens, {NEW} new ones")
    for heading in ("model", "side", "at once"):
        table.add_column(heading)
    for heading in ("tokens/s", "to own single", "to the peer", "first ms", "between ms", "between p99 ms"):
        table.add_column(heading, justify="right")
    rate = {(r.family, r.side, r.at_once): r.timing.tokens_per_second for r in results}
    for r in results:
        ratios = []
        for other in ((r.family, r.side, 1), (r.family, PEER, r.at_once)):
            ratios.append(f"{r.timing.tokens_per_second / rate[other]:.2f}" if other in rate else "")
        shown = (r.timing.first_ms, r.timing.between_ms, r.timing.between_p99_ms)
        times = ["" if np.isnan(value) else f"{value:.1f}" for value in shown]
        table.add_row(r.family, r.side, str(r.at_once), f"{r.timing.tokens_per_second:.1f}", *ratios, *times)
    console.print(table)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is run; the best counts")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides are held to")
    parser.add_argument("--only", choices=("peer", "ours"), help="run transformers alone, or kimi-jax alone")
    parser.add_argument("--family", choices=tuple(FAMILIES), help="one family (default: both)")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= options.cores <= len(allowed):
        parser.error(f"--cores {options.cores}: expected 1 to {len(allowed)}, the cores of this process")
    # Before torch and jax are imported: each sizes its thread pool by this.
    os.sched_setaffinity(0, allowed[: options.cores])
    families = [options.family] if options.family else list(FAMILIES)
    results = [result for family in families for result in measure(family, options.rounds, options.only)]
    show(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
