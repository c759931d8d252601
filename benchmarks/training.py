"""Times forward and backward passes against torch with transformers on a CPU: random 48M-parameter models, float32.

    pip install -e .[oracle]
    python benchmarks/training.py [--rounds 5] [--only peer|ours] [--json FILE]

The models are those of cpu_vs_transformers.py. A pass takes rows of 512 tokens, each of which predicts the next, and
returns the mean loss and the gradients of all parameters. Both sides run in this process on the same cores and take
turns, and each number is the least over the rounds; ratios are to transformers' best, with eager and sdpa attention and
eager and grouped_mm experts. Both keep all activations. CPU time is that of all threads: it says most where other
work shares the cores. Losses and the norms of gradients are printed too, which shows that both sides do the same work.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cpu_vs_transformers import FAMILIES, OURS, transformers_models
from rich.console import Console
from rich.table import Table

from checkpoints.toy import write_toy

TOKENS = 512


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a pass, on the clock and of all threads' CPU time; the loss and the gradients' norm."""

    wall_ms: float
    cpu_ms: float
    loss: float
    norm: float


Side = Callable[[], Timing]


def timed(compute: Callable[[], tuple[float, Callable[[], float]]]) -> Timing:
    """Times `compute`, which returns the loss and a function that computes the gradients' norm."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss, norm = compute()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Timing(1e3 * wall, 1e3 * cpu, loss, norm())


def peer_side(model: Any, tokens: np.ndarray) -> Side:
    import torch

    ids = torch.from_numpy(tokens)

    def compute() -> tuple[float, Callable[[], float]]:
        model.zero_grad(set_to_none=True)
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return loss.item(), lambda: sum(g.double().square().sum().item() for g in gradients) ** 0.5

    return lambda: timed(compute)


def our_side(folder: Path, tokens: np.ndarray) -> Side:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import kimi_jax
    from kimi_jax.training import Rows, split_trained, sum_losses

    graph, trained, frozen = split_trained(kimi_jax.load(folder, dtype=jnp.float32))
    rows = Rows.whole(tokens)

    @jax.jit
    def step(trained: Any) -> Any:
        def loss(trained: Any) -> Any:
            return sum_losses(nnx.merge(graph, trained, frozen), rows, recompute=False)[0].loss / rows.labels.size

        return jax.value_and_grad(loss)(trained)

    def compute() -> tuple[float, Callable[[], float]]:
        loss, gradients = jax.block_until_ready(step(trained))
        return float(loss), lambda: float(optax.tree.norm(gradients))

    return lambda: timed(compute)


def measure(family: str, rounds: int, batch: int, only: str | None) -> dict[str, list[Timing]]:
    """Runs all sides in turn, `rounds` times, after one round that does not count (compilation, caches)."""
    config = FAMILIES[family]
    tokens = np.random.RandomState(0).randint(0, config["vocab_size"] - 256, (batch, TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        path = write_toy(Path(folder) / "model", config)
        sides: dict[str, Side] = {}
        if only != "ours":
            sides |= {name: peer_side(model, tokens) for name, model in transformers_models(path, config)}
        if only != "peer":
            sides[OURS] = our_side(path, tokens)
        timings: dict[str, list[Timing]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            print(f"{family}: {f'round {number} of {rounds}' if number else 'warming up'}", file=sys.stderr)
            for name, run in sides.items():
                time.sleep(0.3)  # the other side's threads spin for a while before they sleep
                timing = run()
                if number:
                    timings[name].append(timing)
    return timings


def show(results: dict[str, dict[str, list[Timing]]], batch: int) -> None:
    console = Console(width=140)
    table = Table("model", "side", title=f"float32, forward and backward of {batch} x {TOKENS} tokens")
    for heading in ("ms", "CPU ms", "ratio", "CPU ratio", "loss", "norm of gradients"):
        table.add_column(heading, justify="right")
    for family, timings in results.items():
        least = {name: [min(t.wall_ms for t in ts), min(t.cpu_ms for t in ts)] for name, ts in timings.items()}
        peers = [times for name, times in least.items() if name != OURS]
        for name, times in least.items():
            ratios = [f"{x / min(peer):.2f}" for x, peer in zip(times, zip(*peers, strict=True), strict=False)]
            last = timings[name][-1]
            numbers = (*(f"{x:.0f}" for x in times), *(ratios or ("", "")), f"{last.loss:.6f}", f"{last.norm:.5f}")
            table.add_row(family, name, *numbers)
    console.print(table)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is run; the least time counts")
    parser.add_argument("--batch", type=int, default=2, help="rows of 512 tokens")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides are held to")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="one of the models; may be repeated")
    parser.add_argument("--only", choices=("peer", "ours"), help="run transformers alone, or kimi-jax alone")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args(arguments)
    allowed = sorted(os.sched_getaffinity(0))
    if options.rounds < 1 or options.batch < 1 or not 1 <= options.cores <= len(allowed):
        parser.error(f"expected at least one round and row, and 1 to {len(allowed)} cores, those of this process")
    # torch and jax, imported later, size their thread pools by this.
    os.sched_setaffinity(0, allowed[: options.cores])

    families = options.family or list(FAMILIES)
    results = {family: measure(family, options.rounds, options.batch, options.only) for family in families}
    show(results, options.batch)
    if options.json:
        lines = {family: {name: list(map(asdict, ts)) for name, ts in r.items()} for family, r in results.items()}
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
