"""`kimi-jax generate`: a prompt's answer, token by token."""

import argparse
import itertools
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from kimi_jax import json_reader
from kimi_jax.cli.arguments import (
    SEED_MAX,
    add_draft,
    add_mesh,
    add_processes,
    add_sampling,
    joined,
    local,
    mesh_of,
    part,
    place,
    sampling_of,
    whole,
)
from kimi_jax.cli.models import check_draft, check_folder
from kimi_jax.cli.starting import add_compile_cache, compiling, keep_programs, load_draft, load_model
from kimi_jax.cli.terminal import for_stdout
from kimi_jax.printable import printable

NAME = "generate"
SUMMARY = "Answer a prompt, token by token. Text goes to standard output, everything else to standard error."
EXAMPLE = (
    'kimi-jax generate ~/models/kimi-k2.5-orbax --prompt "What is this?" --image cat.png\n'
    "  git diff | kimi-jax generate ~/models/kimi-k2.5-orbax --prompt - --no-thinking\n"
    "  kimi-jax generate ~/models/kimi-k2.5-orbax --prompts questions.jsonl --out answers.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=place, help="a checkpoint's folder, converted or published")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to say to the model; - reads it from standard input")
    what.add_argument(
        "--prompts",
        type=local,
        metavar="FILE",
        help="JSON lines, each with a prompt or messages and perhaps an id, max_new_tokens, temperature, ...; all are "
        "answered, many at once, a line of JSON for each as it finishes",
    )
    what.add_argument(
        "--chat", type=local, metavar="FILE", help="JSON: a list of messages, or {messages, tools}, in OpenAI's schema"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture to show with --prompt; may be repeated"
    )
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="MP4 or another film (with kimi-jax[video]), or GIF, WebP or PNG animation, to show with --prompt",
    )
    parser.add_argument(
        "--no-thinking", dest="thinking", action="store_false", help="answer at once (K2.5's Instant mode)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help="length of the answer at most (default 1024, or less where the model's positions end)",
    )
    add_sampling(parser)
    parser.add_argument(
        "--seed", type=whole(0, SEED_MAX), default=0, metavar="N", help="seed of the sampling (default 0)"
    )
    add_draft(parser)
    add_mesh(parser)
    add_processes(parser)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype of weights and activations (default: as stored)"
    )
    many = parser.add_argument_group("with --prompts")
    many.add_argument(
        "--out",
        type=local,
        metavar="FILE",
        help="write the results here; those that are in it already are kept, and their prompts left out",
    )
    many.add_argument("--in-order", action="store_true", help="write results in the order of the prompts")
    many.add_argument("--slots", type=whole(1), default=16, metavar="N", help="prompts at one time (default 16)")
    many.add_argument(
        "--prefill-chunk",
        type=whole(1),
        default=512,
        metavar="N",
        help="tokens of prompts that are taken in beside the next tokens of answers (default 512)",
    )
    many.add_argument(
        "--cache-memory", metavar="SIZE", help="memory of each device for the cache, like 8GiB (default: what is left)"
    )
    many.add_argument(
        "--part", type=part, default=(0, 1), metavar="I/N", help="answer every Nth line, beginning with number I from 0"
    )
    parser.add_argument("--verify", action="store_true", help="hold a converted checkpoint against its checksums first")
    add_compile_cache(parser)


def run(arguments: argparse.Namespace) -> None:
    answer = _answer if arguments.prompts is None else _answer_file
    if arguments.prompts is not None and (arguments.image or arguments.video):
        raise ValueError("--prompts goes without --image and --video")
    if arguments.prompts is None and (
        arguments.out or arguments.in_order or arguments.cache_memory or arguments.part != (0, 1)
    ):
        raise ValueError("--out, --in-order, --cache-memory and --part go with --prompts")
    check_draft(arguments.draft)
    with joined(arguments) as links:
        answer(arguments, links)


def _answer(arguments: argparse.Namespace, links: Any) -> None:
    """Generates; of several processes, which `links` connect, the first prints."""
    conversation = _conversation(arguments)
    check_folder(arguments.path)
    from kimi_jax.answering import checked_max_new_tokens
    from kimi_jax.cli.console import console
    from kimi_jax.processor import Processor
    from kimi_jax.runtime.batch import Finish
    from kimi_jax.runtime.drafts import DraftCounts
    from kimi_jax.runtime.generate import stream

    aloud = links is None or links.first
    log = console(stderr=True, quiet=not aloud)
    kept = keep_programs(arguments)
    began = time.perf_counter()
    processor = Processor.from_folder(arguments.path)
    prompt = processor(thinking=arguments.thinking, **conversation)
    max_new_tokens = checked_max_new_tokens(processor.config, prompt, arguments.max_new_tokens)
    sampling = sampling_of(arguments, arguments.path, arguments.thinking)
    mesh = mesh_of(arguments.mesh, processor.config)
    draft, draft_counts = load_draft(arguments, processor.config, mesh), DraftCounts()
    model = load_model(arguments, mesh, verify=arguments.verify)
    log.print(f"loaded in {time.perf_counter() - began:.1f} s; the prompt has {prompt.tokens.shape[1]} tokens")
    show, end = _printer(processor, prompt, arguments.thinking, conversation.get("tools"), log)
    times = [time.perf_counter()]
    columns = stream(
        model,
        prompt.tokens,
        media=prompt.media,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
        draft=draft,
        draft_tokens=arguments.draft_tokens,
        draft_counts=draft_counts,
    )
    with compiling(log, kept):
        first = next(columns)
    for new, finish in itertools.chain([first], columns):
        times.append(time.perf_counter())
        if finish[0] == Finish.NOT_FINITE:
            raise ValueError(f"the logits after {len(times) - 2} new tokens are not finite (NaN or infinity)")
        if aloud and finish[0] != Finish.STOP:
            show(new.tolist())
    if aloud:
        end()
    rate = f", then {(len(times) - 3) / (times[-1] - times[2]):.1f} tokens per second" if len(times) > 3 else ""
    log.print(f"{len(times) - 1} tokens; the first after {times[1] - times[0]:.1f} s, compilation included{rate}")
    if draft is not None:
        log.print(_drafted(draft_counts))


def _drafted(counts: Any) -> str:
    """Returns what `DraftCounts` say."""
    return (
        f"{counts.accepted} of {counts.tokens} drafted tokens were right ({counts.rate:.0%}), "
        f"{counts.length:.2f} of each of {counts.drafts} drafts"
    )


def _printer(processor: Any, prompt: Any, thinking: bool, tools: Any, log: Any) -> tuple[Any, Any]:
    """Returns a function that prints tokens of an answer, and one that ends it.

    Where standard error is a terminal, reasoning goes there and calls of tools are shown as calls; where it is none,
    the whole answer goes to standard output as the model writes it.
    """
    from kimi_jax.cli.console import console
    from kimi_jax.cli.dialogue.screen import Screen
    from kimi_jax.text import StreamDecoder, chat

    if not log.is_terminal:
        text = StreamDecoder(processor.tokenizer)
        return (
            lambda ids: print(for_stdout(text.push(ids)), end="", flush=True),
            lambda: print(for_stdout(text.finish())),
        )
    starts_in = chat.answer_starts_in(processor.tokenizer, prompt.tokens[0])
    parser = chat.Parser(processor.tokenizer, thinking, tools, processor.template, starts_in=starts_in)
    screen = Screen(console(), log)

    def show(deltas: Any) -> None:
        for delta in deltas:
            screen.show(delta)

    return (lambda ids: show(parser.feed(ids))), (lambda: show(parser.end()))


def _follow_file(arguments: argparse.Namespace, links: Any) -> None:
    """Does a part of the work of process 0, which answers a file of prompts."""
    from kimi_jax.engine import follow
    from kimi_jax.processor import Processor

    if links.receive() == [b""]:
        return  # process 0 has no prompt to answer
    config = Processor.from_folder(arguments.path).config
    mesh = mesh_of(arguments.mesh, config)
    draft = load_draft(arguments, config, mesh)
    follow(load_model(arguments, mesh, verify=arguments.verify), links, draft)


def _answer_file(arguments: argparse.Namespace, links: Any) -> None:
    """Answers a file of prompts; of several processes, which `links` connect, the first has the file and the
    results."""
    if not arguments.prompts.is_file() and (links is None or links.first):
        raise FileNotFoundError(f"{printable(arguments.prompts)}: no such file")
    import asyncio
    import contextlib

    from kimi_jax import offline
    from kimi_jax.cli.console import console
    from kimi_jax.engine import Engine
    from kimi_jax.processor import Processor

    if links is not None and not links.first:
        return _follow_file(arguments, links)
    log = console(stderr=True)
    done: set[str] = set()
    counts = {"answered": 0, "failed": 0, "tokens": 0}

    async def write(engine: Any, processor: Any, lines: Any, defaults: Any, out: Any) -> None:
        async for result in offline.answer_lines(engine, processor, lines, defaults, in_order=arguments.in_order):
            out.write(offline.result_line(result))
            out.flush()
            counts["failed" if "error" in result else "answered"] += 1
            counts["tokens"] += result.get("usage", {}).get("completion_tokens", 0)

    with contextlib.ExitStack() as stack:
        # Both files are opened now, and not after the model is loaded and compiled
        arguments.prompts.open("rb").close()
        out, seconds = sys.stdout, 0.0
        if arguments.out is not None:
            done, out = offline.open_results(arguments.out)
            stack.enter_context(out)
        lines = offline.read_lines(arguments.prompts, done, arguments.part)
        first = next(lines, None)
        if links is not None:
            links.send(b"" if first is None else b"load")
        if first is not None:  # else there is nothing to load a model for
            processor = Processor.from_folder(arguments.path)
            defaults = offline.Defaults(
                sampling_of(arguments, arguments.path, arguments.thinking),
                arguments.max_new_tokens,
                arguments.seed,
                arguments.thinking,
                arguments.prompts.parent,
            )
            mesh = mesh_of(arguments.mesh, processor.config)
            draft = load_draft(arguments, processor.config, mesh)
            model = load_model(arguments, mesh, verify=arguments.verify)
            with compiling(log, keep_programs(arguments)) as name:
                engine = Engine(
                    model,
                    slots=arguments.slots,
                    cache_memory=arguments.cache_memory,
                    prefill_chunk=arguments.prefill_chunk,
                    progress=name,
                    draft=draft,
                    draft_tokens=arguments.draft_tokens,
                    links=links,
                )
            stack.enter_context(engine)
            began = time.perf_counter()
            asyncio.run(write(engine, processor, itertools.chain([first], lines), defaults, out))
            seconds = time.perf_counter() - began
            if draft is not None:
                log.print(_drafted(engine.draft_counts))
    rate = f"; {counts['tokens'] / seconds:.1f} tokens per second" if seconds else ""
    left_out = f", {len(done)} were there already" if done else ""
    log.print(f"{counts['answered']} answered, {counts['failed']} refused{left_out}{rate}")
    if counts["failed"]:
        raise ValueError(f"{counts['failed']} prompts were refused; their results say why")


def _conversation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of a `Processor` that the flags describe.

    Raises FileNotFoundError for a picture that is not there, and ValueError for a chat or prompt that is none.
    """
    if arguments.chat is None:
        for name in [*arguments.image, *arguments.video]:
            if ":" not in name and not Path(name).exists():
                raise FileNotFoundError(f"{printable(name)}: no such file")
        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        if arguments.prompt == "-" and not prompt.strip():
            raise ValueError("--prompt -: standard input is empty, expected what to say to the model")
        return {"messages": prompt, "images": arguments.image, "videos": arguments.video}
    if arguments.image or arguments.video:
        raise ValueError("--image and --video go with --prompt; in a --chat file they are parts of a message")
    chat = json_reader.read(arguments.chat)
    fields = chat if isinstance(chat, dict) else {"messages": chat}
    if not isinstance(fields.get("messages"), list) or not isinstance(fields.get("tools"), list | None):
        raise ValueError(
            f"{arguments.chat}: expected a JSON list of messages, or an object with the lists messages, tools"
        )
    if unread := fields.keys() - {"messages", "tools"}:
        warnings.warn(
            f"{arguments.chat}: only messages and tools are read, not {', '.join(sorted(unread))}", stacklevel=1
        )
    # A chat's strings name files beside it, and no others
    return {"messages": fields["messages"], "tools": fields.get("tools"), "files": arguments.chat.parent}
