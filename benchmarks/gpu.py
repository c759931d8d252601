"""Runs what compiling cannot tell on this machine's GPU, in one command of under ten minutes.

    python benchmarks/gpu.py [--json FILE]    # on a GPU: pip install -e .[cuda], and torch and transformers to compare
    python benchmarks/gpu.py --toy            # small sizes, as on a machine without a GPU

Three parts. `goldens`: logits and greedy tokens of the toy checkpoints in float32 against transformers' recorded ones,
with the exit code 1 where they differ by more than the tests allow. `kernels`: of the calls in `cuda/cases.py` the
least time, and the bytes that they have to move in that time as a share of the GPU's memory bandwidth. `decode`: tokens
a second of Kimi Linear with four layers at full width and random weights in bf16, beside transformers' on the same
device where torch is installed (whose own kernels are in flash-linear-attention and causal-conv1d).
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import jax
import jax.numpy as jnp
import numpy as np
from cuda.cases import CASES, TOYS
from cuda.kernels import KernelCase
from flax import nnx

import kimi_jax
import pallas_kernels as ops
from checkpoints.toy import toy_config
from kimi_jax import config_json
from kimi_jax.plan.job import bits
from kimi_jax.runtime.batch import Chosen, padded_stop_ids, pages_in_order, prompts
from kimi_jax.runtime.program import Program
from kimi_jax.runtime.sampling import Sampling
from pallas_kernels.hardware import GPUS

GOLDENS = ("k2.5", "k2", "kimi-linear")
ATOL = 5e-5  # of tests/kimi_jax/model/test_goldens.py
PARTS = ("goldens", "kernels", "decode")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a run: the goldens, the calls, the decoded model's config.json, its batches, prompt and steps, and how
    often a call is timed."""

    goldens: tuple[str, ...]
    cases: tuple[KernelCase, ...]
    model: dict[str, Any]
    batches: tuple[int, ...]
    prompt: int
    steps: int
    rounds: int


@dataclasses.dataclass(frozen=True)
class Line:
    """One number of a part: what it is of, its value and unit, and a second number in words."""

    part: str
    name: str
    value: float
    unit: str
    beside: str = ""


def sizes(*, toy: bool) -> Sizes:
    """Returns the sizes of a run on a GPU, or the toy's."""
    if toy:
        return Sizes(("kimi-linear",), TOYS, toy_config("kimi-linear"), (2,), 16, 4, 2)
    folder = Path(kimi_jax.__file__).parent / "presets" / "kimi-linear-48b"
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    linear = config["linear_attn_config"]
    kept = {key: [n for n in linear[key] if n <= 4] for key in ("kda_layers", "full_attn_layers")}
    return Sizes(GOLDENS, CASES, config | {"linear_attn_config": linear | kept}, (1, 32), 512, 64, 20)


def bandwidth() -> float | None:
    """Returns the bytes/s of the default device's memory, None for a device that is not in the table of GPUs."""
    kind = jax.devices()[0].device_kind
    return next((gpu.hbm for gpu in GPUS.values() if gpu.facts is not None and gpu.facts.description == kind), None)


def goldens(size: Sizes) -> Iterator[Line]:
    """Compares logits and greedy tokens with the recorded ones; yields the largest difference of each model."""
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
        for name in size.goldens:
            golden = cases.golden(name)
            model = kimi_jax.load(cases.checkpoint(name, Path(folder)), dtype=jnp.float32)
            logits = np.asarray(model(jnp.asarray(golden["text_tokens"])))
            there = np.take_along_axis(logits, golden["text_positions"][..., None], axis=-2)
            differ = float(np.abs(there - golden["text_logits"]).max())
            rows = {"lengths": golden["greedy_lengths"], "max_new_tokens": cases.NEW_TOKENS, "stop_ids": ()}
            new = kimi_jax.generate(model, golden["greedy_prompts"], **rows)
            same = float(np.mean(np.asarray(new) == golden["greedy_tokens"]))
            yield Line("goldens", name, differ, "largest difference", f"{same:.0%} of greedy tokens are the same")


def values(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns random arrays of these shapes, and numbers of experts, pages and positions that the call can have."""
    random = np.random.default_rng(0)

    def fill(array: jax.ShapeDtypeStruct) -> jax.Array:
        if array.dtype == jnp.int4:
            return jax.random.randint(jax.random.key(1), array.shape, -8, 8, jnp.int8).astype(jnp.int4)
        return (jax.random.normal(jax.random.key(2), array.shape, jnp.float32) * 0.1).astype(array.dtype)

    given = [jax.tree.map(lambda x: None if x.dtype == jnp.int32 else fill(x), argument) for argument in arguments]
    called = getattr(function, "func", function)
    if called is ops.mixture:
        tokens, chosen = arguments[1].shape
        experts = jax.tree.leaves(arguments[3])[0].shape[0]
        given[1] = np.stack([random.permutation(experts)[:chosen] for _ in range(tokens)])
    elif called is ops.mla_decode:
        rows, pages = arguments[2].shape
        given[2] = np.arange(rows * pages).reshape(rows, pages)
        given[3] = np.full(rows, pages * arguments[1].shape[2])
    places = [
        np.broadcast_to(np.arange(x.shape[-1]), x.shape) if one is None else one
        for one, x in zip(given, arguments, strict=True)
    ]
    return tuple(jnp.asarray(x, jnp.int32) if isinstance(x, np.ndarray) else x for x in places)


def nbytes(function: Callable[..., Any], given: tuple[Any, ...], made: Any) -> float:
    """Counts the bytes that a call has to move: operands and results once, of experts those that a token chose."""
    total = 0.0
    for number, argument in enumerate(given):
        share = 1.0
        if function is ops.mixture and number >= 3:
            share = len(np.unique(given[1])) / jax.tree.leaves(argument)[0].shape[0]
        total += share * sum(math.prod(x.shape) * bits(x.dtype) / 8 for x in jax.tree.leaves(argument))
    return total + sum(math.prod(x.shape) * bits(x.dtype) / 8 for x in jax.tree.leaves(made))


def kernels(size: Sizes) -> Iterator[Line]:
    """Times the calls; yields microseconds, with the share of the memory's speed."""
    peak = bandwidth()
    for case in size.cases:
        function, shapes = case.build()
        given = values(function, shapes)
        run = jax.jit(lambda *arrays, function=function: function(*arrays))
        made = jax.block_until_ready(run(*given))
        # Several calls follow one another in the queue, so that the host's time for one is not in it
        seconds = min(_seconds(run, given, 10) for _ in range(size.rounds)) / 10
        speed = nbytes(function, given, made) / seconds
        share = "" if peak is None else f", {speed / peak:.0%} of the memory's speed"
        yield Line("kernels", case.name, 1e6 * seconds, "us", f"{speed / 1e9:,.1f} GB/s{share}")


def _seconds(run: Callable[..., Any], given: tuple[Any, ...], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        made = run(*given)
    jax.block_until_ready(made)
    return time.perf_counter() - begin


def decode(size: Sizes) -> Iterator[Line]:
    """Yields tokens a second of decode steps, ours and transformers'."""
    ours = _our_steps(size)
    theirs = _their_steps(size) if _has_peer() else None
    for rows in size.batches:
        seconds = min(ours(rows) for _ in range(3))
        yield Line("decode", f"{rows} rows, kimi-jax", rows / seconds, "tokens/s", f"{1e3 * seconds:.2f} ms a step")
        if theirs is not None:
            peer = min(theirs(rows) for _ in range(3))
            beside = f"{1e3 * peer:.2f} ms a step; kimi-jax takes {seconds / peer:.2f} of it"
            yield Line("decode", f"{rows} rows, transformers", rows / peer, "tokens/s", beside)


def _has_peer() -> bool:
    """Tells whether transformers runs on the kind of device that JAX does."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return False
    import torch

    return jax.default_backend() == "cpu" or bool(torch.cuda.is_available())


def _our_steps(size: Sizes) -> Callable[[int], float]:
    """Returns what times a decode step of so many rows, by seconds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(size.model))
        config = config_json.from_folder(folder)
    model = jax.jit(lambda: kimi_jax.Kimi(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))()
    program = Program(model)
    stops = padded_stop_ids((), 1, config.text.vocab_size)

    def run(rows: int) -> float:
        table, lengths = pages_in_order(rows, size.prompt + size.steps), np.full(rows, size.prompt, np.int32)
        tokens = np.random.default_rng(0).integers(0, config.text.vocab_size, (rows, size.prompt), np.int32)
        limits = {"chunk": size.prompt, "max_new_tokens": size.steps + 1, "stop_ids": np.repeat(stops, rows, axis=0)}
        seeds = np.zeros(rows, np.uint64)
        (batch,) = prompts(tokens, lengths, table, sampling=[Sampling()] * rows, seeds=seeds, **limits)
        cache, first = program.logits(program.cache(table.size, rows), batch)
        chosen = Chosen(jnp.argmax(first, -1).astype(jnp.int32), program.nothing_chosen(rows).finish)
        begin = 0.0
        for i in range(size.steps + 1):
            if i == 1:  # the first compiles
                begin = time.perf_counter() if jax.block_until_ready((chosen, cache)) else 0.0
            cache, chosen = program.step(cache, batch.next_token(lengths + i, chosen))
        jax.block_until_ready((chosen, cache))
        return (time.perf_counter() - begin) / size.steps

    return run


def _their_steps(size: Sizes) -> Callable[[int], float]:
    """Returns what times transformers' decode step of so many rows, by seconds, with random weights in bf16."""
    import torch
    import transformers

    on_gpu = jax.default_backend() != "cpu"
    settings = {key: value for key, value in size.model.items() if key != "model_type"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**settings)).eval()
    torch.set_default_dtype(torch.float32)

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(rows: int) -> float:
        tokens = torch.randint(0, size.model["vocab_size"], (rows, size.prompt), device=model.device)
        with torch.inference_mode():
            out = model(tokens, use_cache=True, logits_to_keep=1)
            begin = now()
            for _ in range(size.steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            return (now() - begin) / size.steps

    return run


def main(arguments: list[str]) -> int:
    """Runs the parts that the flags ask for, and prints their lines; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small sizes; so it is where JAX finds no GPU")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; default all")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args(arguments)
    toy = options.toy or jax.default_backend() != "gpu"
    size, began = sizes(toy=toy), time.perf_counter()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}{', toy sizes' if toy else ''}", flush=True)
    lines = []
    for part in options.part or PARTS:
        for line in {"goldens": goldens, "kernels": kernels, "decode": decode}[part](size):
            print(f"{line.part}: {line.name}: {line.value:,.3g} {line.unit}, {line.beside}", flush=True)
            lines.append(line)
    print(f"{time.perf_counter() - began:.0f} s in all")
    if options.json:
        record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "toy": toy}
        options.json.write_text(json.dumps(record | {"lines": [dataclasses.asdict(x) for x in lines]}, indent=2) + "\n")
    wrong = [line.name for line in lines if line.part == "goldens" and not line.value <= ATOL]
    for name in wrong:
        print(f"{name}: logits differ by more than {ATOL}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
