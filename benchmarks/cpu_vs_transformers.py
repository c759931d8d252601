"""Times kimi-jax against transformers on a CPU: random 48M-parameter models of both families, float32, batch 1.

    pip install -e .[oracle]
    python benchmarks/cpu_vs_transformers.py [--rounds 5] [--only peer|ours] [--json FILE]

Both run in this process on the same cores and take turns, and each number is the least over the rounds: a prefill of
512 tokens with the logits of the last one, then 64 greedy steps, per step. transformers is run with eager and sdpa
attention and with eager and grouped_mm experts, and ratios are to its best. (Its batched_mm experts are left out: they
copy the chosen experts' weights for every token, gigabytes of them in a prefill, and are the slowest.) The largest
difference between the two sides' prefill logits is printed too, which shows that they do the same work.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from checkpoints.toy import toy_config, write_toy

PROMPT, STEPS = 512, 64
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
LINEAR_ATTN = {
    "full_attn_layers": [4],
    "kda_layers": [1, 2, 3],
    "head_dim": 64,
    "num_heads": 8,
    "short_conv_kernel_size": 4,
}
FAMILIES = {
    "K2": toy_config("k2", **SIZES, q_lora_rank=256, n_routed_experts=32, num_experts_per_tok=8),
    "Kimi Linear": toy_config(
        "kimi-linear", **SIZES, linear_attn_config=LINEAR_ATTN, num_experts=32, num_experts_per_token=8
    ),
}
OURS = "kimi-jax"


@dataclass(frozen=True)
class Timing:
    """Seconds of a prefill and of one decode step, and the last logits of the prefill, [vocab]."""

    prefill: float
    step: float
    logits: np.ndarray


@dataclass(frozen=True)
class Result:
    """The least milliseconds of one side on one family, over the rounds."""

    family: str
    side: str
    prefill_ms: float
    step_ms: float
    logits_differ: float


Side = Callable[[np.ndarray], Timing]


def transformers_models(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields transformers' native model with each pair of (attention, experts) implementations, under its name."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    family = config["architectures"][0].removesuffix("ForCausalLM")
    native = getattr(transformers, f"{family}Config")(**{k: v for k, v in config.items() if k != "model_type"})
    model_class = getattr(transformers, f"{family}ForCausalLM")

    for attention, experts in product(("eager", "sdpa"), ("eager", "grouped_mm")):
        model = model_class.from_pretrained(
            folder,
            config=native,
            dtype=torch.float32,
            attn_implementation=attention,
            experts_implementation=experts,
        )
        yield f"transformers ({attention}, {experts})", model.eval()


def transformers_sides(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Side]]:
    """Yields a prefill and decode steps of each of `transformers_models`, under its name."""
    import torch

    for name, model in transformers_models(folder, config):

        def run(tokens: np.ndarray, model: Any = model) -> Timing:
            with torch.inference_mode():
                start = time.perf_counter()
                out = model(torch.from_numpy(tokens), use_cache=True, logits_to_keep=1)
                logits = out.logits[:, -1]
                token = logits.argmax(-1, keepdim=True)
                filled = time.perf_counter()
                for _ in range(STEPS):
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                end = time.perf_counter()
            return Timing(filled - start, (end - filled) / STEPS, logits[0].numpy())

        yield name, run


def our_side(folder: Path) -> Side:
    import jax
    import jax.numpy as jnp

    import kimi_jax
    from kimi_jax.runtime.batch import Chosen, padded_stop_ids, pages_in_order, prompts
    from kimi_jax.runtime.program import Program
    from kimi_jax.runtime.sampling import Sampling

    program = Program(kimi_jax.load(folder, dtype=jnp.float32))
    table, lengths = pages_in_order(1, PROMPT + STEPS), np.array([PROMPT], np.int32)
    stops = padded_stop_ids((), 1, program.config.text.vocab_size)
    chunk = {"chunk": PROMPT, "max_new_tokens": STEPS + 1, "stop_ids": stops}
    argmax = jax.jit(lambda logits: jnp.argmax(logits, -1).astype(jnp.int32))

    def run(tokens: np.ndarray) -> Timing:
        cache = jax.block_until_ready(program.cache(table.size, 1))
        start = time.perf_counter()
        (batch,) = prompts(
            tokens.astype(np.int32), lengths, table, sampling=[Sampling()], seeds=np.zeros(1, np.uint64), **chunk
        )
        cache, first = program.logits(cache, batch)
        token = jax.block_until_ready(argmax(first))
        filled = time.perf_counter()
        chosen = Chosen(token, program.nothing_chosen(1).finish)
        for i in range(STEPS):
            cache, chosen = program.step(cache, batch.next_token(lengths + i, chosen))
        jax.block_until_ready((chosen, cache))
        end = time.perf_counter()
        return Timing(filled - start, (end - filled) / STEPS, np.asarray(first[0]))

    return run


def measure(family: str, rounds: int, only: str | None) -> list[Result]:
    """Runs all sides in turn, `rounds` times, after one round that does not count (compilation, caches)."""
    config = FAMILIES[family]
    tokens = np.random.RandomState(0).randint(0, config["vocab_size"] - 256, (1, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        path = write_toy(Path(folder) / "model", config)
        sides = dict(transformers_sides(path, config)) if only != "ours" else {}
        if only != "peer":
            sides[OURS] = our_side(path)
        timings: dict[str, list[Timing]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            print(f"{family}: {f'round {number} of {rounds}' if number else 'warming up'}", file=sys.stderr)
            for name, run in sides.items():
                time.sleep(0.3)  # the other side's threads spin for a while before they sleep
                timing = run(tokens)
                if number:
                    timings[name].append(timing)
    reference = next(iter(timings.values()))[0].logits
    return [
        Result(
            family,
            name,
            1e3 * min(t.prefill for t in rounds_),
            1e3 * min(t.step for t in rounds_),
            float(np.abs(rounds_[0].logits - reference).max()),
        )
        for name, rounds_ in timings.items()
    ]


def best(results: list[Result], family: str, field: str) -> float:
    """Returns transformers' least milliseconds in `field`, over its implementations."""
    return min(getattr(r, field) for r in results if r.family == family and r.side != OURS)


def show(results: list[Result], only: str | None) -> None:
    # Wide enough for each row to take one line, also where the output is no terminal.
    console = Console(width=140)
    table = Table("model", "side", title=f"float32, batch 1, {PROMPT}-token prefill, {STEPS} decode steps")
    for heading in ("prefill ms", "ms per step", "prefill ratio", "step ratio", "max |logits diff|"):
        table.add_column(heading, justify="right")
    for r in results:
        ratios = ["", ""]
        if only is None:
            ratios = [f"{getattr(r, f) / best(results, r.family, f):.2f}" for f in ("prefill_ms", "step_ms")]
        table.add_row(r.family, r.side, f"{r.prefill_ms:.1f}", f"{r.step_ms:.2f}", *ratios, f"{r.logits_differ:.1e}")
    console.print(table)
    if only is None:
        console.print("Ratios are to transformers' best of each column, over all of its implementations.")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is run; the least time counts")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides are held to")
    parser.add_argument("--only", choices=("peer", "ours"), help="run transformers alone, or kimi-jax alone")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= options.cores <= len(allowed):
        parser.error(f"--cores {options.cores}: expected 1 to {len(allowed)}, the cores of this process")
    # torch and jax, imported later, size their thread pools by this.
    os.sched_setaffinity(0, allowed[: options.cores])

    results = [result for family in FAMILIES for result in measure(family, options.rounds, options.only)]
    show(results, options.only)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
