"""Runs `kimi-jax chat`, a conversation in the terminal with a model in this process or on a server."""

import argparse
from typing import Any

from kimi_jax import json_reader
from kimi_jax.cli.arguments import SEED_MAX, add_sampling, given_sampling, local, sampling_of, whole
from kimi_jax.cli.models import SMALL
from kimi_jax.cli.partner import add_place, add_running, engine_of, server_address, server_key, server_of
from kimi_jax.cli.tools import add_tools, connected, tools_of

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_place(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--tools",
        type=local,
        metavar="FILE",
        help="JSON: list of tools that the model may call, in OpenAI's schema; you type the results",
    )
    add_tools(parser)
    parser.add_argument("--no-thinking", dest="thinking", action="store_false", help="begin in K2.5's Instant mode")
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="length of an answer at most")
    add_sampling(parser)
    parser.add_argument(
        "--seed", type=whole(0, SEED_MAX), metavar="N", help="seed of every answer (default: another for each)"
    )
    add_running(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.tools is not None and (arguments.tool or arguments.mcp):
        raise ValueError("--tools: results are typed, and those of --tool and --mcp come from tools that run")
    tools = _tools(arguments)
    url = server_of(arguments)
    calls = _calls(arguments)
    from kimi_jax.cli.dialogue.conversation import Conversation

    conversation = Conversation(tools, system=arguments.system, thinking=arguments.thinking)
    if url is not None:
        from kimi_jax.cli.dialogue.speakers import ServerSpeaker

        sampling = given_sampling(arguments)
        limits: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
        speaker = ServerSpeaker(server_address(url), server_key(arguments), arguments.model, sampling, **limits)
        _talk(conversation, calls, speaker, url)
    else:
        _talk_here(arguments, conversation, calls)


def _talk_here(arguments: argparse.Namespace, conversation: Any, calls: Any) -> None:
    """Loads the model, and talks with it."""
    from kimi_jax.cli.dialogue.speakers import EngineSpeaker

    sampling = {mode: sampling_of(arguments, arguments.path, mode) for mode in (True, False)}
    with engine_of(arguments) as (engine, processor):
        speaker = EngineSpeaker(
            engine, processor, sampling, max_new_tokens=arguments.max_new_tokens, seed=arguments.seed
        )
        _talk(conversation, calls, speaker, str(arguments.path))


def _talk(conversation: Any, calls: Any, speaker: Any, name: str) -> None:
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
        take_turns(conversation, speaker, keyboard, screen, calls)
    finally:
        keyboard.save()


def _calls(arguments: argparse.Namespace) -> Any:
    """Returns what runs the calls of the tools that are given; None where there are none."""
    if not (arguments.tool or arguments.mcp):
        return None
    tools = tools_of(arguments)
    from kimi_jax.cli.console import console
    from kimi_jax.cli.dialogue.asking import Asker
    from kimi_jax.cli.dialogue.calls import Calls

    asking = set[str]()
    return Calls(connected(arguments, tools, asking, Asker(console(stderr=True), asking)))


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
