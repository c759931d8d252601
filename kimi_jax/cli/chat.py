"""Runs `kimi-jax chat`, a conversation in the terminal with a model in this process or on a server."""

import argparse
import os
from typing import Any
from urllib.parse import urlsplit

from kimi_jax import json_reader
from kimi_jax.cli.arguments import (
    SEED_MAX,
    add_mesh,
    add_sampling,
    given_sampling,
    local,
    mesh_of,
    place,
    sampling_of,
    whole,
)
from kimi_jax.cli.models import SMALL, check_folder, small_model
from kimi_jax.cli.starting import add_compile_cache, compiling, keep_programs, load_model

NAME = "chat"
SUMMARY = (
    "Talk with a model in the terminal: one in a folder, one on a server with OpenAI's API, or the small trained Kimi "
    "of this package. /help says what else can be typed."
)
EXAMPLE = (
    "kimi-jax chat\n"
    "  kimi-jax chat ~/models/kimi-k2.5-orbax --mesh auto\n"
    "  kimi-jax chat http://localhost:8000 --no-thinking"
)
PREFILL_CHUNK, CPU_PREFILL_CHUNK = 512, 16
KEY_VARIABLES = ("KIMI_JAX_API_KEY", "OPENAI_API_KEY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=place,
        nargs="?",
        metavar="FOLDER|URL",
        help="a checkpoint's folder, converted or published, or a server's http:// address (default: the small model)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="small model of the package, like digits; with a URL, the server's name for it"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--tools", type=local, metavar="FILE", help="JSON: list of tools that the model may call, in OpenAI's schema"
    )
    parser.add_argument("--no-thinking", dest="thinking", action="store_false", help="begin in K2.5's Instant mode")
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="length of an answer at most")
    add_sampling(parser)
    parser.add_argument(
        "--seed", type=whole(0, SEED_MAX), metavar="N", help="seed of every answer (default: another for each)"
    )
    add_mesh(parser)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="dtype of weights and activations (default: as stored)"
    )
    parser.add_argument(
        "--cache-memory", metavar="SIZE", help="memory of each device for the cache, like 8GiB (default: what is left)"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"key for a server (default: {' or '.join(KEY_VARIABLES)})")
    add_compile_cache(parser)


def run(arguments: argparse.Namespace) -> None:
    from kimi_jax.cli.dialogue.conversation import Conversation

    tools = _tools(arguments)
    url = arguments.path if isinstance(arguments.path, str) else None
    if url is not None and urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url}: expected a folder on this machine, or a server's http:// address")
    if url is None:
        if arguments.path is not None and arguments.model is not None:
            raise ValueError("--model goes without a folder: it names a small model, or one of a server's")
        if arguments.path is None:
            arguments.path = small_model(arguments.model or SMALL)
        check_folder(arguments.path)
    conversation = Conversation(tools, system=arguments.system, thinking=arguments.thinking)
    if url is not None:
        from kimi_jax.cli.dialogue.speakers import ServerSpeaker

        sampling = given_sampling(arguments)
        limits: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
        speaker = ServerSpeaker(server_address(url), server_key(arguments), arguments.model, sampling, **limits)
        _talk(conversation, speaker, url)
    else:
        _talk_here(arguments, conversation)


def _talk_here(arguments: argparse.Namespace, conversation: Any) -> None:
    """Loads the model, and talks with it."""
    import jax

    from kimi_jax.cli.console import console
    from kimi_jax.cli.dialogue.speakers import EngineSpeaker
    from kimi_jax.engine import Engine
    from kimi_jax.processor import Processor

    log, kept = console(stderr=True), keep_programs(arguments)
    processor = Processor.from_folder(arguments.path)
    sampling = {mode: sampling_of(arguments, arguments.path, mode) for mode in (True, False)}
    model = load_model(arguments, mesh_of(arguments.mesh, processor.config))
    # A CPU compiles each program for seconds: pieces of one length need half as many of them as longer ones
    chunk = CPU_PREFILL_CHUNK if jax.default_backend() == "cpu" else PREFILL_CHUNK
    with compiling(log, kept) as name:
        engine = Engine(model, slots=1, cache_memory=arguments.cache_memory, prefill_chunk=chunk, progress=name)
    with engine:
        speaker = EngineSpeaker(
            engine, processor, sampling, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed
        )
        _talk(conversation, speaker, str(arguments.path))


def _talk(conversation: Any, speaker: Any, name: str) -> None:
    from kimi_jax.cli.console import console
    from kimi_jax.cli.dialogue.keyboard import Keyboard, state_folder
    from kimi_jax.cli.dialogue.loop import take_turns
    from kimi_jax.cli.dialogue.screen import Screen
    from kimi_jax.printable import printable

    keyboard, screen = Keyboard(state_folder() / "chat_history"), Screen(console(), console(stderr=True))
    if keyboard.is_terminal:
        mode = "thinking" if conversation.thinking else "instant"
        screen.note(f"{printable(name)}, {mode}. /help lists commands, Ctrl-D ends.\n")
    try:
        take_turns(conversation, speaker, keyboard, screen)
    finally:
        keyboard.save()


def _tools(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.tools is None:
        if arguments.path is None and (arguments.model or SMALL) in (SMALL, *SMALL.split("-")):
            from kimi_jax import small

            return [small.ADD_TOOL]
        return []
    tools = json_reader.read(arguments.tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{arguments.tools}: expected a JSON list of tools, in OpenAI's schema")
    return tools


def server_address(url: str) -> str:
    """Returns the address that the client takes: `/v1` is added where the URL has no path."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def server_key(arguments: argparse.Namespace) -> str:
    """Returns the key that is sent to a server: that of `--api-key`, else that of the environment."""
    named = (os.environ[name] for name in KEY_VARIABLES if os.environ.get(name))
    return arguments.api_key or next(named, "none")
