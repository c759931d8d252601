"""The server's throughput and latency at 1, 4 and 16 streams, beside `transformers serve` on the same model.

    pip install -e .[oracle,serve] 'transformers[serving]' httpx
    python benchmarks/serving.py [--rounds 3] [--only peer|ours] [--json FILE]

The random K2 of 48M parameters of cpu_vs_transformers.py in float32, prompts of 64 tokens, 32 new ones, greedy,
streamed by /v1/completions. Each side is a process of its own, held to the same cores as the client here; they take
turns, and the round with the most tokens a second counts. transformers serves one request after another: its continuous
batching does not run this model. Tokens are those that the servers count.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cpu_vs_transformers import FAMILIES
from rich.console import Console
from rich.table import Table

from checkpoints.toy import write_toy
from kimi_jax.text.tiny import BASE_RANKS, write_tiny_tokenizer

PROMPT, NEW = 64, 32
AT_ONCE = (1, 4, 16)
OURS, PEER = "kimi-jax serve", "transformers serve"
READY_S, ANSWER_S = 1800.0, 600.0
LETTERS = list(string.ascii_letters)


@dataclass(frozen=True)
class Timing:
    """New tokens a second over all streams, and medians of milliseconds to the first text and between two."""

    tokens_per_second: float
    first_ms: float
    between_ms: float


@dataclass(frozen=True)
class Result:
    """The best round of one side with so many streams at once."""

    side: str
    at_once: int
    timing: Timing


@dataclass(frozen=True)
class Served:
    """A server that answers: the address of its API and the name of its model."""

    url: str
    model: str


def write_folders(folder: Path) -> dict[str, Path]:
    """Writes the model as each side reads it, with tokenizers that are alike, and returns the folders by side."""
    config = FAMILIES["K2"]
    ours, peer = write_toy(folder / "ours", config), folder / "peer"
    words = write_our_tokenizer(ours, config["vocab_size"] - 256)
    peer.mkdir()
    for file in (*ours.glob("*.safetensors*"), ours / "generation_config.json"):
        (peer / file.name).symlink_to(file)
    (peer / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    write_peer_tokenizer(peer, words)
    return {PEER: peer, OURS: ours}


def write_our_tokenizer(folder: Path, size: int) -> list[bytes]:
    """Writes a tokenizer of `size` words and 256 special ones, and returns the words: the bytes, then pairs of
    printable characters, so that nearly each token is a text of its own."""
    write_tiny_tokenizer(folder)
    file = folder / "tiktoken.model"
    single = [base64.b64decode(line.split()[0]) for line in file.read_text().splitlines()[:256]]
    pairs = [bytes(pair) for pair in product(range(0x20, 0x7F), repeat=2)]
    # A blank and a letter are one token: prompts are made of these.
    pairs.sort(key=lambda pair: not (pair[:1] == b" " and pair[1:].isalpha()))
    words = [*single, *pairs][:size]
    file.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    special = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {str(int(number) - BASE_RANKS + size): token for number, token in special}
    file.write_text(json.dumps(config))
    return words


def write_peer_tokenizer(folder: Path, words: list[bytes]) -> None:
    """Writes the same words as a file of the tokenizers library, whose names of bytes are in the order of the words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {word[0]: name for word, name in zip(words[:256], alphabet, strict=True)}
    spelt = ["".join(names[byte] for byte in word) for word in words]
    merges = [(name[0], name[1]) for name in spelt[256:]]
    tokenizer = Tokenizer(models.BPE({name: rank for rank, name in enumerate(spelt)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|special_{index}|>", special=True) for index in range(256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@contextlib.contextmanager
def server(side: str, folder: Path) -> Iterator[Served]:
    """Starts one side's server as a process, waits until it answers, and ends it. Raises SystemExit where it does not
    start, with the end of what it wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if side == OURS:
        sizes = ["--slots", str(max(AT_ONCE)), "--max-model-len", "512", "--cache-memory", "256MiB"]
        command = ["-m", "kimi_jax.cli", "serve", str(folder), "--port", port, "--dtype", "float32", *sizes]
    else:
        start = "from transformers.cli.transformers import main; main()"
        command = ["-c", start, "serve", str(folder), "--port", port, "--device", "cpu", "--dtype", "float32"]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        began = time.monotonic()
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() - began > READY_S:
                raise SystemExit(f"{side} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield Served(url, folder.name if side == OURS else str(folder))
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


async def stream(client: httpx.AsyncClient, served: Served, prompt: str) -> tuple[list[float], int]:
    """Returns the times at which text came, and how many tokens it was. Raises SystemExit where a server refuses, or
    counts another prompt than it was sent."""
    options = {"max_tokens": NEW, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    body: dict[str, Any] = {"model": served.model, "prompt": prompt, **options}
    times, usage = [], None
    async with client.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{served.url} answered {answer.status_code}: {(await answer.aread()).decode()[:500]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(f"{served.url} failed: {chunk['error']}")
            usage = chunk.get("usage") or usage
            if any(choice.get("text") for choice in chunk["choices"]):
                times.append(time.perf_counter())
    if usage is None or usage["prompt_tokens"] != PROMPT or not times:
        raise SystemExit(f"{served.url}: usage is {usage}, expected {PROMPT} tokens of a prompt and some text")
    return times, usage["completion_tokens"]


async def measure(served: Served, prompts: list[str]) -> Timing:
    """Sends all prompts at once."""
    async with httpx.AsyncClient(timeout=ANSWER_S) as client:
        began = time.perf_counter()
        answers = await asyncio.gather(*(stream(client, served, prompt) for prompt in prompts))
        seconds = time.perf_counter() - began
    between = np.concatenate([np.diff(times) for times, _ in answers])
    return Timing(
        sum(count for _, count in answers) / seconds,
        1e3 * float(np.median([times[0] - began for times, _ in answers])),
        1e3 * float(np.median(between)) if between.size else float("nan"),
    )


def measure_sides(rounds: int, only: str | None) -> list[Result]:
    """Runs both sides in turn, `rounds` times after one that does not count, each time with other prompts."""
    random = np.random.default_rng(0)
    best: dict[tuple[str, int], Timing] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        folders = write_folders(Path(folder))
        sides: dict[str, Served] = {}
        for side, other in ((PEER, "ours"), (OURS, "peer")):
            if only != other:
                print(f"starting {side}", file=sys.stderr)
                sides[side] = running.enter_context(server(side, folders[side]))
        for number in range(rounds + 1):
            print(f"round {number} of {rounds}" if number else "warming up", file=sys.stderr)
            for count in AT_ONCE:
                prompts = ["".join(f" {letter}" for letter in random.choice(LETTERS, PROMPT)) for _ in range(count)]
                for side, served in sides.items():
                    time.sleep(0.3)  # the other side's threads spin for a while before they sleep
                    timing = asyncio.run(measure(served, prompts))
                    before = best.get((side, count))
                    if number and (before is None or timing.tokens_per_second > before.tokens_per_second):
                        best[side, count] = timing
    return [Result(side, count, timing) for (side, count), timing in best.items()]


def show(results: list[Result]) -> None:
    table = Table(title=f"float32, prompts of {PROMPT} tokens, up to {NEW} new ones, streamed")
    for heading in ("side", "streams"):
        table.add_column(heading)
    for heading in ("tokens/s", "to the peer", "first ms", "to the peer", "between ms"):
        table.add_column(heading, justify="right")
    peers = {result.at_once: result.timing for result in results if result.side == PEER}
    for result in results:
        ours, peer = result.timing, peers.get(result.at_once)
        rate = "" if peer is None else f"{ours.tokens_per_second / peer.tokens_per_second:.2f}"
        first = "" if peer is None else f"{ours.first_ms / peer.first_ms:.3f}"
        shown = (f"{ours.tokens_per_second:.1f}", rate, f"{ours.first_ms:.1f}", first, f"{ours.between_ms:.1f}")
        table.add_row(result.side, str(result.at_once), *shown)
    Console(width=120).print(table)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is run; the best counts")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides and the client are held to")
    parser.add_argument("--only", choices=("peer", "ours"), help="run transformers alone, or kimi-jax alone")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= options.cores <= len(allowed):
        parser.error(f"--cores {options.cores}: expected 1 to {len(allowed)}, the cores of this process")
    # The servers inherit it, and size their thread pools by it.
    os.sched_setaffinity(0, allowed[: options.cores])
    results = measure_sides(options.rounds, options.only)
    show(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
